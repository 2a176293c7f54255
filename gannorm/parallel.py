"""Several processes that train one model: torch.distributed, as its launcher torchrun sets it up.

Each works on its own samples of every batch. What is drawn at random is drawn for the whole batch
by every process, from generators in the same state, and each takes its own samples' part: so any
number of processes trains on the images, noise and augmentation of one, and a checkpoint's
generators are right for any number. In a single process nothing here communicates.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gannorm.norms.sync import add, gather

T = TypeVar("T")
CPU = torch.device("cpu")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
PREPARATION = timedelta(hours=2)  # that the others wait while one downloads or decodes
PATIENCE = 5.0  # seconds in which torchrun ends the processes that outlive one
_alone = [False]
_heard: list[Callable[[], int]] = []  # inside of `leavable`


class Left(BaseException):
    """What was under way is left for a signal, `number`; no Exception, which some code swallows."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def joined_processes() -> Iterator[None]:
    """Inside, this process is one of several, if torchrun started it among several."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    store, number, count = next(dist.rendezvous("env://"))
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        # Started again, nobody is to be looked for where those before were. (Each machine counts
        # for itself: on several, torchrun has to make a new store, see docs/scaling.md.)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=PREPARATION
    )
    yield
    dist.destroy_process_group()


@contextmanager
def failing_together() -> Iterator[None]:
    """What all processes meet, the first one tells: torchrun ends the others when it has failed.

    So does whoever first loses a process; what is met by one alone it tells after a while.
    """
    try:
        yield
    except Exception as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world() > 1 and (lost or not leads()):
            time.sleep(PATIENCE)
        raise


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    """How many processes train together."""
    together = dist.is_available() and dist.is_initialized() and not _alone[0]
    return dist.get_world_size() if together else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def leads() -> bool:
    """Whether this process writes for all: logs, checkpoints, bars."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works without the others, whatever they do."""
    before, _alone[0] = _alone[0], True
    try:
        yield
    finally:
        _alone[0] = before


def forked_rng() -> AbstractContextManager[None]:
    """Inside, torch's generators of the CPU and of this process's GPU are left as they were."""
    own = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(own)


# ---- a batch's parts


def own(count: int) -> slice:
    """This process's part of `count` samples; where they do not divide, some have one more."""
    n, r = world(), rank()
    return slice(count * r // n, count * (r + 1) // n)


def drawn(make: Callable[[int], Tensor], count: int, batches: int = 1) -> Tensor:
    """This process's `count` samples of make(samples of all processes).

    batches: that lie behind each other in the samples, such as real and generated images.
    """
    n = world()
    if n == 1:
        return make(count)
    whole = make(count * n)
    parts = whole.view(batches, n, count // batches, *whole.shape[1:])
    return parts[:, rank()].flatten(0, 1)


def gathered(images: Tensor) -> Tensor:
    """All processes' images (N, ...), of one shape, in the order of the whole batch."""
    if world() == 1:
        return images
    bits = images.contiguous().view(torch.uint8)  # gloo does not know every type
    out = gather(bits.flatten()).view(world() * len(bits), *bits.shape[1:])
    return out.view(images.dtype)


# ---- the same everywhere


def means(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each tensor's mean over the processes: one all-reduce for all, which are of one type."""
    if world() == 1 or not tensors:
        return tensors
    flat = torch.cat([t.detach().flatten() for t in tensors])
    add(flat)
    pieces = flat.div_(world()).split([t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes the first process's."""
    if world() > 1:
        for t in tensors:
            whole = t.detach().contiguous()
            dist.broadcast(whole, 0)
            t.detach().copy_(whole)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process; it is not called in others."""
    if world() == 1:
        return make()
    found: list[Any] = [make() if leads() else None]
    dist.broadcast_object_list(found, 0, device=CPU)
    return found[0]


@contextmanager
def leavable(heard: Callable[[], int]) -> Iterator[None]:
    """Inside, `joined` raises `Left` in all processes when one has `heard` a signal."""
    _heard.append(heard)
    try:
        yield
    finally:
        _heard.pop()


def each(parts: Iterable[T]) -> Iterator[T]:
    """This process's parts of what is then `joined`; no more of them once it will be left."""
    for part in parts:
        if _heard and _heard[-1]():
            return
        yield part


def joined(parts: list[T]) -> list[T]:
    """All processes' lists, behind each other.

    Raises:
        Left: inside of `leavable`, one of them has heard a signal.
    """
    if world() == 1:
        return parts
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, (parts, _heard[-1]() if _heard else 0))
    if number := max(number for _, number in found):
        raise Left(number)
    return [part for parts, _ in found for part in parts]


@contextmanager
def one_first() -> Iterator[None]:
    """One process of each machine goes through the block before its others, which find what it
    leaves on the disk."""
    if world() > 1 and local_rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and local_rank() == 0:
        dist.barrier()


class Question:
    """A number that every process sets; `answer` is the largest of those when it was asked.

    Asked on the CPU and answered while a step is computed: no process waits for a GPU.
    """

    def ask(self, number: int) -> None:
        self.number, self.work = torch.tensor([number]), None
        if world() > 1:
            self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, async_op=True)

    def answer(self) -> int:
        if self.work is not None:
            self.work.wait()
        return int(self.number)


def differing(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of the tensors, by name, that is not the same to the bit in all processes, and
    where; by the sum of its bits."""
    if world() == 1:
        return None
    sums = [
        t.detach().contiguous().view(BITS[t.element_size()]).sum(dtype=torch.int64)
        for t in tensors.values()
    ]
    mine = torch.stack(sums)
    every = gathered(mine[None]).cpu()
    wrong = (every != every[0]).nonzero().tolist()
    if not wrong:
        return None
    process, number = min(wrong, key=lambda at: at[1])
    return f"{list(tensors)[number]} of process {process}"
