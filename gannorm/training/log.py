"""Files that only grow, kept in memory while the disk takes nothing."""

import os
import threading
from collections import deque
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from gannorm.training.report import tell

ROOM = 1 << 26  # bytes of what waits for the disk


class Trouble:
    """Tells once when something can no longer be written, and once when it can again."""

    def __init__(self, what: str, meanwhile: str) -> None:
        self.what, self.meanwhile, self.now = what, meanwhile, False

    def failed(self, error: OSError) -> None:
        if not self.now:
            reason = error.strerror or error
            tell(f"cannot write {self.what}: {reason}; training goes on, {self.meanwhile}")
        self.now = True

    def ended(self, lost: str = "") -> None:
        if self.now:
            tell(f"{self.what} can be written again{lost}")
        self.now = False


class Log:
    """A file that records are added to, each whole or not at all; TensorBoard's writer and its
    thread take it for one of theirs.

    It is opened for each record, since a disk that is gone takes what is written to open files.
    """

    closed = False

    def __init__(self, path: Path, name: str) -> None:
        path.open("ab").close()
        self.path, self.size = path, path.stat().st_size
        self.waiting: deque[bytes] = deque()
        self.lost = 0
        self.trouble = Trouble(f"{name} ({path})", "what belongs there waits in memory")
        self.lock = threading.Lock()

    def write(self, record: bytes) -> None:
        with self.lock:
            self.waiting.append(record)
            while sum(map(len, self.waiting)) > ROOM:
                self.waiting.popleft()
                self.lost += 1
        self.flush()

    def flush(self) -> None:
        with self.lock:
            if not self.waiting:
                return
            try:
                while self.waiting:
                    self._append(self.waiting[0])
                    self.waiting.popleft()
            except OSError as error:
                self.trouble.failed(error)
                return
            self.trouble.ended(f"; {self.lost} records were too many" if self.lost else "")
            self.lost = 0

    def sync(self) -> None:
        """What was written outlasts a power cut too."""
        self.flush()
        try:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            self.trouble.failed(error)

    def _append(self, record: bytes) -> None:
        """The file is not made anew: where it is gone, its disk is."""
        with open(self.path, "r+b", buffering=0) as file:
            self.size = min(self.size, file.seek(0, os.SEEK_END))
            file.truncate(self.size)  # of what was refused before, when it was closed too
            file.seek(self.size)
            rest = memoryview(record)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(self.size)  # half a record
                raise
        self.size += len(record)

    def close(self) -> None:
        self.flush()
        if self.waiting:
            tell(f"{len(self.waiting)} records of {self.path} could not be written")
            self.waiting.clear()


def board(run_dir: Path, purge_step: int | None) -> SummaryWriter:
    """TensorBoard's writer, whose thread outlives a disk that takes nothing for a while."""
    writer = SummaryWriter(str(run_dir), purge_step=purge_step, flush_secs=10)
    writer.flush()  # its thread has nothing to do now
    events = writer._get_file_writer().event_writer
    records = events._async_writer._writer
    records._writer = Log(Path(events._file_name), "TensorBoard's events")
    return writer
