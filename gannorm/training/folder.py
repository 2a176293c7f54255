"""The run folder: one process's at a time, and every file in it whole or not there."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gannorm import parallel
from gannorm.errors import RequestError
from gannorm.training.report import tell

LOCK = ".lock"  # in a run folder: whose it is
# Of file systems that know no locks, or no fsync of a folder.
UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_held: set[Path] = set()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is `path` once the block has ended well: even after a power cut
    there is all of it, or what was there before.

    Its folder is not made: one that is gone in the middle of a run was another disk's.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def sync(folder: Path) -> None:
    """Let a folder's entries outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Inside, whatever the disk refuses is a request for another folder."""
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"cannot write to the run folder {run_dir}: {error.strerror or error}; choose another "
            "with hydra.run.dir="
        ) from error


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Inside, the run folder is this process's: made, and locked against a second one.

    The lock is the kernel's, for a record of a file (fcntl): it ends with the process, however that
    ends, and children that outlive it, such as the workers that load data, do not have it.

    Raises:
        RequestError: another process has it, or it cannot be written to.
    """
    if not parallel.leads():
        yield
        return
    made, key = not run_dir.exists(), Path(os.path.realpath(run_dir))
    try:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(run_dir, key)
        _held.add(key)
        try:
            yield
        finally:
            with suppress(OSError):  # of a disk that is gone
                (run_dir / LOCK).unlink()
            _held.discard(key)
            os.close(descriptor)
    finally:
        if made:
            with suppress(OSError):  # what was refused leaves no folder
                run_dir.rmdir()


def _lock(run_dir: Path, key: Path) -> int:
    """The descriptor that holds the lock. (Nothing else in this process may open the file: closing
    that would end the lock too.)"""
    path = run_dir / LOCK
    while True:
        if key in _held:
            raise _taken(run_dir, f"this process, {os.getpid()}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        acquired = False
        try:
            acquired = _acquired(descriptor)
            if not acquired:
                raise _taken(run_dir, f"process {os.read(descriptor, 999).decode() or 'unknown'}")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
        except BaseException:
            if acquired:  # the disk is full
                path.unlink()
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner ended and took the file away: once more


def _acquired(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in UNKNOWN:
            raise
        tell(f"no lock on the run folder ({error.strerror}): let no second process write to it")
    return True


def _taken(run_dir: Path, owner: str) -> RequestError:
    return RequestError(
        f"another run is writing to {run_dir} ({owner}); wait for it or end it, or choose another "
        "folder with hydra.run.dir="
    )
