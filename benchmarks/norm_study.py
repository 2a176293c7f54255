"""`python -m gannorm.study`, by its former name."""

from gannorm.errors import answering_requests
from gannorm.study.__main__ import main

if __name__ == "__main__":
    with answering_requests():
        main()
