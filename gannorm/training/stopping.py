"""Ctrl-C, SIGTERM and whatever else `trainer.stop_signals` names: a run ends behind its step."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

from gannorm import parallel
from gannorm.parallel import Left

AGAIN = 1.0  # seconds


class Stop:
    """Inside the block a signal asks the run to end; a second one ends the process at once (or,
    where that waits in code that is not Python's, as soon as it comes back).

    One that comes within a second is the first: who signals all processes of a job, as Slurm does,
    signals torchrun too, which hands it on.

    All processes of a run agree on it in each step, so that they end behind the same one. The
    handler saves nothing: it takes a note, or leaves what nobody needs (`leaving`).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.numbers = [signal.Signals[name] for name in names]
        self.signal, self.heard, self.question = 0, 0.0, parallel.Question()
        self.leaves = False

    def __enter__(self) -> "Stop":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._hear) for number in self.numbers}
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
            if self.leaves:
                raise Left(number)
        elif time.monotonic() - self.heard > AGAIN:
            signal.signal(number, signal.SIG_DFL)  # nothing is unwound, nothing waited for
            signal.raise_signal(number)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, a signal raises `Left` wherever the program is: for what may be lost."""
        if self.signal:
            raise Left(self.signal)
        self.leaves = True
        try:
            yield
        finally:
            self.leaves = False

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """`leaving` that several processes do together, when they exchange what they have
        (`parallel.each`, `parallel.joined`)."""
        if parallel.world() == 1:
            with self.leaving():
                yield
        else:
            with parallel.leavable(lambda: self.signal):
                yield

    def ask(self) -> None:
        """At the beginning of a step."""
        self.question.ask(self.signal)

    def asked(self) -> int:
        """At its end: the signal that some process had heard at the beginning, or 0."""
        answer = self.question.answer()
        return self.signal if parallel.world() == 1 else answer

    def now(self) -> int:
        """The signal that some process has heard, or 0; asked of all at once."""
        self.ask()
        return self.asked()
