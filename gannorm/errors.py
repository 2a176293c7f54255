"""The one error that means "you asked for something that cannot be done"."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RequestError(ValueError):
    """A wrong request: the message names the value, the place and the way out.

    The command lines print it as one line on stderr and exit with code 2; every other
    exception is a failure of the program and keeps its traceback.
    """


@contextmanager
def answering_requests() -> Iterator[None]:
    """Turn a RequestError inside the block into its one line and exit code 2."""
    try:
        yield
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
