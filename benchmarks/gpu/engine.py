"""Stages of named items, each run in a process that may die: a crash or a hang costs one item.

The command's own process never touches the GPU. It hands names to workers, one line each, and
writes every answer to the stage's JSON file as soon as it is there; whatever ends the command, the
files are whole. An illegal access to memory spoils a CUDA context for good, so a worker that meets
a CUDA error answers and ends, and another one takes over.
"""

import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import timing

START = 120.0  # seconds for a worker to be ready in
GRACE = 10.0  # that running items are left at their stage's end
SPOILT = re.compile("cuda|cudnn|cublas|accelerator", re.IGNORECASE)  # an error of the device
CUT_OFF = "cut off at the end of the stage's time"
Result = dict[str, Any]


@dataclass
class Report:
    """What a stage found: an answer for each item, why there is none, and what was not tried."""

    stage: str
    path: Path
    environment: Result
    items: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def write(self) -> None:
        content = {k: v for k, v in vars(self).items() if k not in ("path", "environment")}
        timing.write(self.environment | content, self.path)

    @property
    def wrong(self) -> dict[str, str]:
        """Items that ran and were found wrong."""
        found = {name: result.get("wrong", "") for name, result in self.items.items()}
        return {name: words for name, words in found.items() if words}

    @property
    def faults(self) -> dict[str, str]:
        """Items without a result, but for those that the end of the time cut off."""
        return {name: why for name, why in self.failed.items() if why != CUT_OFF}


@dataclass(frozen=True)
class Context:
    """Where items run."""

    out: Path
    rehearsed: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsed else "cuda"


class _Worker:
    """A process that answers a stage's names."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, bufsize=0, start_new_session=True,
            )  # fmt: skip
        self.ready = False

    def ask(self, name: str, limit: float, until: float) -> tuple[Result | None, str]:
        """The answer within `limit` seconds, `until` (time.monotonic) at the latest; or None and
        what became of the process."""
        assert self.process.stdin is not None
        if not self.ready:
            line, reason = self._line(START, until)
            if not line:
                return None, reason if reason == CUT_OFF else f"before it began: {reason}"
            self.ready = True
        try:
            self.process.stdin.write(f"{name}\n".encode())
        except BrokenPipeError:
            return None, self._end()
        line, reason = self._line(limit, until)
        return (json.loads(line) if line else None), reason

    def _line(self, limit: float, until: float) -> tuple[bytes, str]:
        """A line from the process, or an empty one and why."""
        assert self.process.stdout is not None
        left = max(0.0, until - time.monotonic())
        if not select.select([self.process.stdout], [], [], min(limit, left))[0]:
            self.kill()
            return b"", CUT_OFF if left < limit else f"no answer in {limit:.0f} s"
        line = self.process.stdout.readline()
        return (line, "") if line.endswith(b"\n") else (b"", self._end())

    def _end(self) -> str:
        code = self.process.wait()
        return f"the process died: signal {-code}" if code < 0 else f"the process ended: {code}"

    def kill(self) -> None:
        """And the processes that it started."""
        if self.process.returncode is None:  # not waited for yet: the number is still its own
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps it: go on without
            self.process.wait(10)

    def close(self) -> None:
        """Let the process end by itself, which it does when nothing more can be asked."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


class _Stage:
    """The items of one stage, and the workers that take them in turn."""

    def __init__(
        self, report: Report, names: list[str], start: Callable[[], _Worker], deadline: float,
        limit: float,
    ) -> None:  # fmt: skip
        self.report, self.names, self.start = report, names, start
        self.deadline, self.limit, self.began = deadline, limit, time.monotonic()
        self.todo, self.lock = queue.SimpleQueue[str](), threading.Lock()
        for name in names:
            self.todo.put(name)
        self.running: set[_Worker] = set()
        self.stopped, self.broken = threading.Event(), list[Exception]()
        self.bar = tqdm(total=len(names), desc=report.stage, unit="item", dynamic_ncols=True)

    def note(self, name: str, result: Result | None, reason: str) -> None:
        report = self.report
        with self.lock:
            if result is None:
                report.failed[name] = reason
            elif "error" in result:
                report.failed[name] = result["error"]
            else:
                report.items[name] = result
            report.seconds = round(time.monotonic() - self.began, 1)
            done = report.items.keys() | report.failed.keys()
            report.not_reached = [n for n in self.names if n not in done]
            report.write()
            self.bar.update()

    def work(self) -> None:
        worker: _Worker | None = None
        while not self.stopped.is_set() and time.monotonic() < self.deadline:
            try:
                name = self.todo.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                worker = self.start()
                self.running.add(worker)
            result, reason = worker.ask(name, self.limit, self.deadline + GRACE)
            if self.stopped.is_set():
                break
            self.note(name, result, reason)
            if result is None or result.pop("last", False):
                worker.kill()
                self.running.discard(worker)
                worker = None
        if worker is not None and not self.stopped.is_set():
            worker.close()
            self.running.discard(worker)

    def guarded(self) -> None:
        try:
            self.work()
        except Exception as error:  # of this command's own, such as a full disk
            self.broken.append(error)


def run_stage(
    report: Report, names: list[str], command: list[str], environment: Mapping[str, str],
    workers: int, deadline: float, limit: float,
) -> None:  # fmt: skip
    """Run `names` in their order until `deadline` (time.monotonic), `limit` seconds each at most.

    KeyboardInterrupt ends the workers and passes on.
    """
    log = report.path.with_suffix(".log")
    stage = _Stage(report, names, partial(_Worker, command, environment, log), deadline, limit)
    count = min(workers, len(names))
    threads = [threading.Thread(target=stage.guarded, daemon=True) for _ in range(count)]
    try:
        report.not_reached = list(names)
        report.write()
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stage.stopped.set()
        for worker in list(stage.running):
            worker.kill()
        stage.bar.close()
    if stage.broken:
        raise stage.broken[0]


def serve(run: Callable[[str], Result]) -> None:
    """A worker: answer the names that come on stdin with a line of JSON each, until it closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an item prints is none of the answers
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        last = False
        try:
            result = run(line.strip())
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: {error}".strip().splitlines()
            result = {"error": " ".join(words[:2])[:300]}
            last = bool(SPOILT.search(f"{type(error).__name__} {error}"))
        print(json.dumps(result | ({"last": True} if last else {})), file=answers, flush=True)
        if last:
            return
