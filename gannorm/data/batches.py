"""How batch number k is made.

Batch k of a run is a pure function of (source, seed, k): which samples, in which order, with
which augmentation. A resumed run therefore continues with exactly the batches that it would have
seen, with any number of worker processes, and there is no sampler state to save but the step. Of
several processes that train together each takes its own part of the same batch.
"""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from gannorm.data.source import Batch, PartialSource, Source
from gannorm.errors import RequestError


class _Stream(Dataset):
    """Batch k, for any k: every domain's samples in an order of its own, reshuffled each epoch."""

    def __init__(self, domains: list[Source], batch_size: int, seed: int, own: slice) -> None:
        self.domains, self.batch_size, self.seed, self.own = domains, batch_size, seed, own
        self.orders: dict[int, tuple[int, list[int]]] = {}

    def _index(self, domain: int, position: int) -> int:
        epoch, offset = divmod(position, len(self.domains[domain]))
        if self.orders.get(domain, (-1,))[0] != epoch:
            generator = _generator(self.seed, domain, epoch)
            order = torch.randperm(len(self.domains[domain]), generator=generator).tolist()
            self.orders[domain] = (epoch, order)
        return self.orders[domain][1][offset]

    def __getitem__(self, k: int) -> list[Batch] | RequestError:
        start = k * self.batch_size
        batch = []
        for d, source in enumerate(self.domains):
            index = [self._index(d, p) for p in range(start, start + self.batch_size)]
            try:
                batch.append(_part(source, index, _generator(self.seed, d, -1 - k), self.own))
            except RequestError as error:  # raised by a worker it would arrive as a traceback
                return error
        return batch


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


def batches(
    domains: list[Source],
    *,
    batch_size: int,
    start: int,
    stop: int,
    seed: int,
    num_workers: int = 0,
    own: slice = slice(None),
) -> Iterator[list[Batch]]:
    """Batches `start` to `stop - 1`: for each, a list with one dict of tensors per domain.

    own: which of a batch's samples are returned.
    """
    loader = DataLoader(
        _Stream(domains, batch_size, seed, own),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws on the global one, once for each start
    )
    return _raise_errors(loader)


def _leave_signals(worker: int) -> None:
    """To the training process, which ends behind its step and wants its batches until then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _raise_errors(loader: DataLoader) -> Iterator[list[Batch]]:
    for batch in loader:
        if isinstance(batch, RequestError):
            raise batch
        yield batch


def fetch_all(source: Source, limit: int | None = None) -> Batch:
    """The first `limit` samples (all by default) of an unaugmented source, in order."""
    count = len(source) if limit is None else min(limit, len(source))
    return source.fetch(list(range(count)), _generator(0))
