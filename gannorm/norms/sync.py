"""Batch norms over processes: the statistics are those of all their batches together.

Forward, every process gathers everybody's (count, mean, squares around it) of each channel and
merges them: an all-gather, since a sum of such could only be one of E[x^2], which cancels.
Backward, one all-reduce of the sums of gain * g and gain * g * x_hat. Both are float64. Each
process's part comes from its backend's own kernels (`gannorm.norms.pieces`).

dx is the gradient of the sum of all processes' losses; those of weight and bias are this process's
part, as from torch's SyncBatchNorm: who sums the other parameters' (DDP) sums them. An empty batch
takes part in everything.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from gannorm.norms import composed, pieces
from gannorm.norms.composed import NormSpec

WORLD = "world"  # of all processes, whatever torch calls it
ALONE = (  # said where somebody follows tensors, and would lose them between processes
    "with a process_group of several processes, training runs neither under torch.func, forward "
    "mode, is_grads_batched nor a dispatch mode, nor on tensor subclasses, and torch.export, "
    "jit.trace and make_fx cannot hold it; call .eval() first, set process_group=None, or take "
    "this process's batch alone, inside of gannorm.norms.sync.suspended()"
)
AWAKE = 0.05  # seconds
_suspended: list[None] = []  # one for each block: of the process, since backward has threads


@contextmanager
def suspended() -> Iterator[None]:
    """Inside, every norm of this process is on its own, in training too: nobody is waited for.

    Of what was made outside with other processes, none can be differentiated inside.
    """
    _suspended.append(None)
    try:
        yield
    finally:
        _suspended.pop()


def name_of(process_group: Any) -> str:
    """What a group is kept by: a layer can then be copied, pickled and traced."""
    name = getattr(process_group, "group_name", process_group)
    if not isinstance(name, str):
        raise TypeError(
            f"process_group={process_group!r} is no group that this process belongs to; pass "
            f'"{WORLD}" for all processes, what torch.distributed.new_group returned to its '
            "members, or its group_name"
        )
    return name


def resolved(process_group: Any) -> str | None:
    """The name of the group to share statistics with; None: there is nobody else.

    Raises:
        ValueError: torch.distributed knows no group of this name here.
    """
    name = name_of(process_group)
    if _suspended or not dist.is_available() or not dist.is_initialized():
        return None
    return name if _size(name) > 1 else None


def _size(name: str) -> int:
    c10d: Any = dist.distributed_c10d
    if name == WORLD:
        return dist.get_world_size()
    try:
        return c10d._get_group_size_by_name(name)
    except (KeyError, RuntimeError, ValueError):
        raise ValueError(
            f"process_group={name!r} is the name of no group that this process belongs to; pass "
            f'"{WORLD}" for all processes, or what torch.distributed.new_group returned to its '
            "members"
        ) from None


def _group(name: str) -> Any:
    c10d: Any = dist.distributed_c10d
    return dist.group.WORLD if name == WORLD else c10d._resolve_process_group(name)


def gather(mine: Tensor, group: Any = None) -> Tensor:
    """Everybody's `mine` (L,), as (processes, L); of all processes unless told."""
    group = group or dist.group.WORLD
    everyone = mine.new_empty(group.size() * len(mine))
    # torch 2.14 deprecates the one, 2.11 has no other.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    _wait(call(everyone, mine, group=group, async_op=True), mine)
    return everyone.view(-1, len(mine))


def add(mine: Tensor, group: Any = None) -> None:
    """`mine` becomes the sum over all processes, unless told over those of a group."""
    _wait(dist.all_reduce(mine, group=group, async_op=True), mine)


def _wait(work: Any, t: Tensor) -> None:
    """On a CPU awake at first: a core that falls asleep may take milliseconds to wake."""
    until = time.perf_counter() + AWAKE
    while t.is_cpu and not work.is_completed() and time.perf_counter() < until:
        os.sched_yield()
    work.wait()


class _Sum(torch.autograd.Function):
    """The sum over all processes. So is its gradient: everybody's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, name: str) -> Tensor:
        ctx.group = name
        total = mine.contiguous().clone()
        add(total, _group(name))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad, ctx.group), None


class Synced(NamedTuple):
    """How a call runs with other processes; part of a `Call`."""

    group: str
    parts: Any  # this process's: `gannorm.norms.pieces`, those in C, or of the kernels
    spec: NormSpec
    degenerate: str  # as in `batch_norm`, like the next
    var_estimator: str

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
        residual: Tensor | None, moments: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y and the statistics (5, C), see `gannorm.norms.pieces`; moves the running ones."""
        mean, var, momentum = moments
        local = self.parts if x.numel() else pieces
        everyone = gather(local.moments(x), _group(self.group))
        if self.degenerate == "raise" and everyone.is_cpu and float(everyone[:, 0].sum()) == 1:
            raise ValueError(
                "batch norm: one value per channel in all processes together has no variance; use "
                'a larger batch or image, or degenerate="beta" to get exactly the bias'
            )
        running, unbiased = (mean, var, float(momentum), 1.0), self.var_estimator == "unbiased"
        dtype = composed.stat_dtype(x.dtype)
        stats, moved = self.parts.merge(everyone, running, self.spec.eps, dtype, unbiased)
        if not moved:
            update_running(moments, stats, self.var_estimator)
        return local.apply(x, weight, bias, labels, residual, stats, self.spec), stats

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        labels: Tensor | None, residual: Tensor | None, stats: Tensor,
    ) -> pieces.Grads:  # fmt: skip
        """As `Call.backward`, with dx: without it there is nothing to exchange."""
        if _suspended:
            raise RuntimeError(
                "a batch norm that ran with other processes cannot be differentiated inside of "
                "gannorm.norms.sync.suspended(), which waits for nobody; run the forward pass "
                "inside too"
            )
        local = self.parts if x.numel() else pieces
        totals, finish = local.sums(dy, x, weight, bias, labels, residual, stats, self.spec)
        add(totals, _group(self.group))
        return finish(totals / stats[4])

    def composition(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
        residual: Tensor | None, stats: Tensor,
    ) -> Tensor:  # fmt: skip
        """y as a composition of differentiable torch ops and one all-reduce.

        The statistics that are known are constants here, by which x is normalized first: mean and
        variance of the result are all but 0 and 1 then, and their sums cancel nothing.
        """
        spec, dtype = self.spec, stats.dtype
        mean, error, rstd = (t.view(1, -1, 1) for t in stats[:3])
        x_hat = (composed.planes(x).to(dtype) - mean - error) * rstd
        mine = torch.stack((x_hat.sum((0, 2)), x_hat.square().sum((0, 2)))).double()
        first, second = (_Sum.apply(mine, self.group) / stats[4]).to(dtype).unsqueeze(-1)
        y = (x_hat - first) * (second - first.square() + spec.eps * rstd[0].square()).rsqrt()
        gain, shift = (composed.table_rows(t, labels, dtype) for t in (weight, bias))
        if gain is not None:
            y = y * gain
        if shift is not None:
            y = y + shift
        added = None if residual is None else composed.planes(residual)
        return composed.shaped(composed.finish(y, added, spec, False).to(x.dtype), x)


def update_running(moments: Any, stats: Tensor, var_estimator: str) -> None:
    """Move the running statistics in `moments` by those of all processes."""
    mean, var, momentum = moments
    if mean is None and var is None:
        return
    count = stats[4].double()
    bessel: Any = 1.0
    if var_estimator == "unbiased":
        bessel = (count / (count - 1).clamp(min=1)).to(stats.dtype)
    composed.update_running((mean, var, momentum, bessel), stats[:4])
