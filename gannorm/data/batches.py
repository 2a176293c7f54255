"""How batch number k is made.

Batch k of a run is a pure function of (source, seed, k): which samples, in which order, with
which augmentation. A resumed run therefore continues with exactly the batches that it would have
seen, with any number of worker processes, and there is no sampler state to save but the step. Of
several processes that train together each takes its own part of the same batch.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any
from weakref import finalize

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gannorm.data.source import Batch, PartialSource, Source, finite, name
from gannorm.errors import RequestError, RunError

NAMED = 4  # images of a domain, where a batch is described


class _Stream(Dataset):
    """Batch k, for any k: every domain's samples in an order of its own, reshuffled each epoch."""

    def __init__(self, domains: list[Source], batch_size: int, seed: int, own: slice) -> None:
        self.domains, self.batch_size, self.seed, self.own = domains, batch_size, seed, own
        self.orders: dict[int, tuple[int, list[int]]] = {}
        self.at_work = torch.empty(0)  # by worker the batch it makes; -1 while it makes none

    def _index(self, domain: int, position: int) -> int:
        epoch, offset = divmod(position, len(self.domains[domain]))
        if self.orders.get(domain, (-1,))[0] != epoch:
            generator = _generator(self.seed, domain, epoch)
            order = torch.randperm(len(self.domains[domain]), generator=generator).tolist()
            self.orders[domain] = (epoch, order)
        return self.orders[domain][1][offset]

    def numbers(self, domain: int, k: int) -> list[int]:
        """Of a domain's images in batch k."""
        start = k * self.batch_size
        return [self._index(domain, p) for p in range(start, start + self.batch_size)]

    def __getitem__(self, k: int) -> list[Batch] | RequestError:
        self._at(k)
        batch = []
        for d, source in enumerate(self.domains):
            index = self.numbers(d, k)
            try:
                part = _part(source, index, _generator(self.seed, d, -1 - k), self.own)
                batch.append(finite(part, source, index[self.own]))
            except RequestError as error:  # raised by a worker it would arrive as a traceback
                return error
        self._at(-1)
        return batch

    def _at(self, k: int) -> None:
        """Write down, in a worker, which batch it makes."""
        worker = get_worker_info()
        if worker is not None:
            self.at_work[worker.id] = k

    def described(self, k: int) -> str:
        """The images of batch k, in words; a few of many."""
        out = []
        for d, source in enumerate(self.domains):
            index = self.numbers(d, k)[self.own]
            names = ", ".join(name(source, i) for i in index[:NAMED])
            more = f" and {len(index) - NAMED} more" if len(index) > NAMED else ""
            out.append(f"{type(source).__name__} {names}{more}")
        return "; ".join(out)


def _part(source: Source, index: list[int], generator: torch.Generator, own: slice) -> Batch:
    if isinstance(source, PartialSource):
        return source.fetch_part(index, generator, own)
    return {name: values[own] for name, values in source.fetch(index, generator).items()}


def _generator(*key: int) -> torch.Generator:
    """A generator for this key: neighbouring keys give unrelated streams."""
    seed = 0
    for part in key:
        seed = (seed * 6364136223846793005 + part * 1442695040888963407 + 1) % 2**63
        seed ^= seed >> 29
    return torch.Generator().manual_seed(seed)


class Batches(Iterator[list[Batch]]):
    """Batches in the order of their numbers; as a context it tells of its worker processes.

    Inside of the block a worker that dies, or gives no batch in time, ends it with a RunError;
    none outlives the block.
    """

    def __init__(
        self, stream: _Stream, numbers: range, num_workers: int, timeout: float,
        signals: Sequence[str],
    ) -> None:  # fmt: skip
        self.stream, self.num_workers, self.timeout = stream, num_workers, timeout
        self.next = numbers.start
        if num_workers:
            stream.at_work = torch.full((num_workers,), -1).share_memory_()
        self.loader: Any = iter(
            DataLoader(
                stream,
                batch_size=None,
                sampler=numbers,
                num_workers=num_workers,
                timeout=timeout if num_workers else 0,
                worker_init_fn=partial(_begin, signals),
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else it draws on the global one, once a start
            )
        )
        # At the process's end too, which waits for them else.
        self.end = finalize(self, _end, self.loader) if num_workers else lambda: None

    def __next__(self) -> list[Batch]:
        batch = next(self.loader)
        if isinstance(batch, RequestError):
            raise batch
        self.next += 1
        return batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        told = self._fault(error) if isinstance(error, RuntimeError) else None
        self.end()
        if told is not None:
            raise RunError(told) from error

    def _fault(self, error: RuntimeError) -> str | None:
        """What torch says of a worker, with what that was at; None of anything else."""
        said = str(error).splitlines()[0] if self.num_workers else ""
        if "DataLoader timed out" in said:
            at_fault = self.stream.at_work == self.next
            what = f"has given no batch for data.worker_timeout={self.timeout:g} seconds"
            way_out = "look at these and at their disk, or set a longer data.worker_timeout"
        elif said.startswith("DataLoader worker (pid"):
            codes = [_exit_code(worker) for worker in self.loader._workers]
            at_fault = torch.tensor([bool(code) for code in codes])
            code = next((code for code in codes if code), 0)
            what = f"ended with exit code {code}" if code > 0 else f"was killed by {_named(-code)}"
            way_out = "give it more memory, or set a smaller data.num_workers"
        else:
            return None
        workers = f"data.num_workers={self.num_workers}"
        if not at_fault.any():
            return f"{said.rstrip('.')} ({workers})"
        number = int(at_fault.long().argmax())
        process, batch = self.loader._workers[number].pid, int(self.stream.at_work[number])
        at = f"at batch {batch}: {self.stream.described(batch)}" if batch >= 0 else "waiting"
        return f"worker {number} of {workers} (process {process}) {what}; it was {at}; {way_out}"


def _exit_code(worker: BaseProcess) -> int | None:
    worker.join(0.1)
    return worker.exitcode


def _named(number: int) -> str:
    """A signal by its name, with what most often sends it."""
    name = signal.Signals(number).name
    lacks = {"SIGKILL": "memory", "SIGBUS": "shared memory (/dev/shm)"}
    return f"{name}, most likely for want of {lacks[name]}" if name in lacks else name


def _end(loader: Any) -> None:
    """End its workers: those who are at work too, which ignore SIGTERM."""
    thread = getattr(loader, "_pin_memory_thread", None)
    if thread is not None and thread.is_alive():  # first: it may read what they still write
        loader._pin_memory_thread_done_event.set()
        loader._worker_result_queue.put((None, None))
        thread.join()
    for worker in loader._workers:
        worker.kill()
    for worker in loader._workers:
        with suppress(RuntimeError):  # by which torch tells of their death
            worker.join(1)  # one that waits for a disk without an end outlives even that
    loader._shutdown_workers()


def batches(
    domains: list[Source],
    *,
    batch_size: int,
    start: int,
    stop: int,
    seed: int,
    num_workers: int = 0,
    own: slice = slice(None),
    timeout: float = 0.0,
    signals: Sequence[str] = (),
) -> Batches:
    """Batches `start` to `stop - 1`: for each, a list with one dict of tensors per domain.

    own: which of a batch's samples are returned.
    timeout: seconds without a batch of the workers that are too many; 0: none are.
    signals: what these too leave to the training process, by name.
    """
    stream = _Stream(domains, batch_size, seed, own)
    return Batches(stream, range(start, stop), num_workers, timeout, signals)


def _begin(signals: Sequence[str], worker: int) -> None:
    """In a worker, which leaves signals to the training process: that ends behind its step, wants
    its batches until then, and then ends its workers."""
    for each in ("SIGINT", "SIGTERM", *signals):
        signal.signal(signal.Signals[each], signal.SIG_IGN)


def fetch_all(source: Source, limit: int | None = None) -> Batch:
    """The first `limit` samples (all by default) of an unaugmented source, in order."""
    count = len(source) if limit is None else min(limit, len(source))
    return source.fetch(list(range(count)), _generator(0))
