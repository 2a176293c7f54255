"""Ctrl-C, or SIGTERM: a run ends behind its step, with a checkpoint."""

import signal
import threading
import time
from types import FrameType, TracebackType

from gannorm import parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 1.0  # seconds


class Stop:
    """Inside the block a signal asks the run to end; a second one ends the process at once.

    One that comes within a second is the first: who signals all processes of a job, as Slurm does,
    signals torchrun too, which hands it on.

    All processes of a run agree on it in each step, so that they end behind the same one.
    """

    def __enter__(self) -> "Stop":
        self.signal, self.heard, self.question = 0, 0.0, parallel.Question()
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self.heard = number, time.monotonic()
        elif time.monotonic() - self.heard > AGAIN:
            self.__exit__(None, None, None)
            signal.raise_signal(number)

    def ask(self) -> None:
        """At the beginning of a step."""
        self.question.ask(self.signal)

    def asked(self) -> int:
        """At its end: the signal that some process had heard at the beginning, or 0."""
        answer = self.question.answer()
        return self.signal if parallel.world() == 1 else answer
