"""The one error that means "you asked for something that cannot be done"."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RequestError(ValueError):
    """A wrong request: the message names the value, the place and the way out.

    The command lines print it as one line on stderr and exit with code 2; every other
    exception is a failure of the program and keeps its traceback.
    """


class RunError(RuntimeError):
    """What ended a run through no fault of the request: one line on stderr, exit code 1."""


@contextmanager
def answering_requests() -> Iterator[None]:
    """Turn a RequestError inside the block into its one line and exit code 2.

    A missing package too: the norms need torch alone, the command lines the extra `train`. And a
    file or folder that is somebody else's.
    """
    try:
        yield
    except RequestError as error:
        said = str(error)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except PermissionError as error:
        if error.filename is None:
            raise
        said = f"cannot open {error.filename}: {error.strerror}"
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] in ("gannorm", "torch"):
            raise
        said = f'{error.name} is not installed; training needs it: pip install -e ".[train]"'
    else:
        return
    print(f"error: {said}", file=sys.stderr)
    raise SystemExit(2)
