"""Processes that torch.distributed joins, each of which calls what it is told to; and what they
send each other while they do.

Gloo joins them on CPUs, NCCL on GPUs, as in training (`gannorm/parallel.py`).
"""

import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple
from unittest import mock

from torch.profiler import ProfilerActivity, profile

from gannorm import parallel

BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1,
         "c10::BFloat16": 2, "c10::Half": 2}  # fmt: skip


class Group:
    """`size` processes of `threads` threads each; use it as a context manager."""

    def __init__(self, size: int, threads: int = 1) -> None:
        context, port = get_context("spawn"), _free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            own = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "OMP_NUM_THREADS": threads,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "KINETO_LOG_LEVEL": 99,
            }  # fmt: skip
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with mock.patch.dict(os.environ, {name: str(value) for name, value in own.items()}):
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float = 300.0) -> list:
        """What function(*arguments) returns in each process.

        Raises:
            RuntimeError: one raises, ends, or has no answer in `limit` seconds; all are ended.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[int, Any] = {}
        until = time.monotonic() + limit
        while len(answers) < len(self.pipes):
            left = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(left, max(0.0, until - time.monotonic()))
            if not ready:
                self._fail(f"no answer in {limit:.0f} s")
            for each in ready:
                assert isinstance(each, Connection)
                rank = self.pipes.index(each)
                try:
                    answers[rank], error = each.recv()
                except (EOFError, ConnectionResetError):
                    error = "the process died"
                if error:
                    self._fail(f"process {rank}: {error}")
        return [answers[rank] for rank in range(len(self.pipes))]

    def _fail(self, why: str) -> None:
        for process in self.processes:
            process.kill()
        raise RuntimeError(why)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection) -> None:
    with parallel.joined_processes():
        while True:
            try:
                function, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((function(*arguments), ""))
            except Exception as error:
                traceback.print_exc()
                pipe.send((None, f"{type(error).__name__}: {error}"))


class Message(NamedTuple):
    """A collective as one process takes part in it: what it puts in."""

    kind: str  # all_reduce, all_gather, ...
    dtype: str
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]


@contextmanager
def watched() -> Iterator[Counter[Message]]:
    """Filled at the end of the block with the collectives that its process took part in.

    Torch's profiler sees them where the backend sends them. A dispatch mode would see them too, and
    change what the norms do (docs/norms.md); wrapped functions would miss those of compiled code.
    """
    found: Counter[Message] = Counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        yield found
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        backend, _, kind = event.name().partition(":")
        if backend in ("gloo", "nccl") and not kind.startswith("barrier"):
            shapes, dtypes = event.shapes(), event.dtypes()
            elements = 1
            for length in shapes[0]:
                elements *= length
            kind = "all_gather" if "gather" in kind else kind  # nccl:_all_gather_base
            found[Message(kind, dtypes[0], elements)] += 1
