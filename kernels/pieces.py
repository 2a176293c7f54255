"""A batch norm in pieces, between which processes exchange what they have of the batch.

Always the split plan: its partials are what is exchanged. Before the exchange a small kernel merges
each set's, after it one merges the processes' (and moves the running statistics); backward one adds
the planes' sums up. The rest are the split plan's own kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gannorm.kernels import launch
from gannorm.kernels.launch import (
    KEPT,
    MERGED_SETS,
    TABLE_COLUMNS,
    TABLE_SUMS,
    Launches,
    Plan,
    Running,
    facts,
)
from gannorm.kernels.layout import placed
from gannorm.kernels.runner import Kernel
from gannorm.kernels.split import (
    mean_grads,
    merge_moments,
    split_apply_kernel,
    split_dx_kernel,
    split_moments_kernel,
    split_sums_kernel,
    table_grad_kernel,
)
from gannorm.kernels.tile import (
    first_elements,
    program_sets,
    reciprocal,
    statistics,
    store_statistics,
    update_running,
    wide,
)

CHANNELS = 32  # that a program merging processes takes

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def own_moments_kernel(
    x_ptr,  # (N, C, S)
    partial_ptr,  # (2, chunks, C)
    moments_ptr,  # (1 + 2C,) float64, written: count, means, sums of squares around them
    stride_n, stride_c, planes, sets, size, total, chunks, loops,
    DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLIT_S: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, "batch", BLOCK_G)
    first = first_elements(x_ptr, stride_n, stride_c, n, g0, planes, sets, "batch", BLOCK_G, DTYPE)
    offset, square = merge_moments(
        partial_ptr, index, mine, planes, size, total, chunks, loops,
        BLOCK_P, BLOCK_G, BLOCK_S, SPLIT_S,
    )  # fmt: skip
    tl.store(moments_ptr + 1 + index, first.to(tl.float64) + offset, mask=mine)
    tl.store(moments_ptr + 1 + wide(total) + index, square, mask=mine)
    if tl.program_id(0) == 0:
        tl.store(moments_ptr, tl.full([], 1.0, tl.float64) * planes * size)


@triton.jit
def all_moments_kernel(
    everyone_ptr,  # (processes, 1 + 2C) float64
    stats_ptr,  # (5, C), written: see `statistics`; the count
    running_mean_ptr, running_var_ptr,  # (C,), moved, or None
    momentum,
    processes, channels,
    EPS: tl.constexpr, DTYPE: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chan's merge, around the mean of the first process that has values: equal ones stay so."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < channels
    row = 2 * wide(channels) + 1
    count = tl.full([], 0.0, tl.float64)
    first = tl.zeros([BLOCK], tl.float64)
    for k in range(0, processes):
        seen = tl.load(everyone_ptr + k * row)
        mean = tl.load(everyone_ptr + k * row + 1 + index, mask=live, other=0)
        first = tl.where((count == 0) & (seen > 0), mean, first)
        count += seen
    share = reciprocal(count, 1)
    offset = tl.zeros([BLOCK], tl.float64)
    for k in range(0, processes):
        seen = tl.load(everyone_ptr + k * row)
        mean = tl.load(everyone_ptr + k * row + 1 + index, mask=live, other=0)
        offset += tl.where(seen > 0, (mean - first) * seen, 0.0) * share
    square = tl.zeros([BLOCK], tl.float64)
    for k in range(0, processes):
        seen = tl.load(everyone_ptr + k * row)
        mean = tl.load(everyone_ptr + k * row + 1 + index, mask=live, other=0)
        inner = tl.load(everyone_ptr + k * row + 1 + channels + index, mask=live, other=0)
        apart = mean - first - offset
        square += tl.where(seen > 0, inner + seen * apart * apart, 0.0)
    mean, error, rstd, var = statistics(first, offset, square, count, 1, EPS, DTYPE)
    store_statistics(stats_ptr, channels, index, live, mean, error, rstd, var)
    tl.store(stats_ptr + 4 * wide(channels) + index, mean * 0 + count.to(DTYPE), mask=live)
    if running_mean_ptr is not None or running_var_ptr is not None:
        bessel = tl.full([], 1.0, tl.float64)
        if UNBIASED:
            bessel = count * reciprocal(tl.maximum(count - 1, 1), 1)
        update_running(
            running_mean_ptr, running_var_ptr, index, live, mean, var, momentum, bessel.to(DTYPE)
        )


@triton.jit
def own_sums_kernel(
    sums_ptr,  # (2, parts, N, C)
    weight_ptr, labels_ptr,  # (K, C), (N,), or None
    totals_ptr,  # (2, C) float64, written: sums of weight * g, weight * g * x_hat
    samples, rows, channels, planes, sets, size, total, parts,
    BLOCK_G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, "batch", BLOCK_G)
    a, b = mean_grads(
        sums_ptr, weight_ptr, labels_ptr, n, g0, samples, rows, channels, planes, sets, size,
        parts, "batch", BLOCK_G, DTYPE,
    )  # fmt: skip
    count = tl.full([], 1.0, tl.float64) * planes * size
    tl.store(totals_ptr + index, a.to(tl.float64) * count, mask=mine)
    tl.store(totals_ptr + wide(total) + index, b.to(tl.float64) * count, mask=mine)


class Pieces:
    """The launches of a batch norm on tensors of one kind, piece by piece.

    tensors: as of `Launches`; x may be empty, and only `merge` is called then.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], spec: Any) -> None:
        self.base = Launches(tensors, spec, False)  # what it knows of the tensors
        self.plan: Plan | None = None
        self.merges: dict[Any, Kernel] = {}

    def _planned(self) -> Plan:
        n, rows, c = self.base.sizes
        planes, sets, size, _ = self.base.domain
        last, itemsize = self.base.strides[1] == 1 and c > 1, self.base.statistics.itemsize
        key = launch.bounds_key(True, c, planes, size, itemsize, last)
        p = launch.plan(  # as if statistics were given: split
            True, n, planes, sets, size, itemsize, last, True,
            launch._processors(self.base.device), launch._bounds(self.base.device, key),
        )  # fmt: skip
        spec, dtype = self.base.spec, tl.float64 if itemsize == 8 else tl.float32
        numbers = (*self.base.x_strides, *self.base.strides, *self.base.sizes, *self.base.domain)
        blocks = (p.block_p, p.block_g, p.block_s, p.even, p.cut)
        slope = ("batch", spec.activation, spec.negative_slope)
        grid, chunks, parts = (p.blocks, p.chunks, 1), (p.chunks, p.loops), (p.parts, p.loops)
        merging = (triton.cdiv(c, MERGED_SETS), 1, 1)

        def kernel(of: Any, numbers: Any, constants: Any, grid: Any = grid, warps: int = p.warps):
            return Kernel(of, grid, warps, numbers, constants, self.base.device)

        self.moments_of = kernel(
            split_moments_kernel, (*self.base.x_strides, *self.base.domain, *chunks),
            ("batch", dtype, *blocks),
        )  # fmt: skip
        self.own = kernel(
            own_moments_kernel, (*self.base.x_strides[:2], *self.base.domain, *chunks),
            (dtype, p.block_p, MERGED_SETS, p.block_s, p.cut), merging, 4,
        )  # fmt: skip
        self.apply_to = kernel(
            split_apply_kernel, (*numbers, *chunks),
            (*slope, spec.eps, dtype, spec.residual_after_activation, *blocks),
        )  # fmt: skip
        self.sum, self.dx = (
            kernel(of, (*numbers, *parts), (*slope, dtype, *blocks))
            for of in (split_sums_kernel, split_dx_kernel)
        )
        self.add = kernel(
            own_sums_kernel, (*self.base.sizes, *self.base.domain, p.parts), (MERGED_SETS, dtype),
            merging, 4,
        )  # fmt: skip
        self.table = kernel(
            table_grad_kernel, (n, c, p.parts),
            (dtype, min(TABLE_SUMS, triton.next_power_of_2(n)), TABLE_SUMS, TABLE_COLUMNS),
            (rows, triton.cdiv(c, TABLE_COLUMNS), 1), 4,
        )  # fmt: skip
        self.plan = p
        return p

    def moments(self, x: Tensor) -> Tensor:
        """Count, means, sums of squares around them: (1 + 2C,) float64."""
        p = self.plan or self._planned()
        x = placed(x, self.base.stride) if self.base.copied else x
        c = self.base.sizes[2]
        partial = x.new_empty((2, p.chunks, c), dtype=torch.float64)
        found = x.new_empty(1 + 2 * c, dtype=torch.float64)
        self.moments_of((x, partial))
        self.own((x, partial, found))
        return found

    def merge(
        self, everyone: Tensor, running: Running, eps: float, dtype: torch.dtype, unbiased: bool
    ) -> tuple[Tensor, bool]:
        """The statistics (5, C) of all processes' moments, and whether the running ones moved."""
        mean, var, momentum, _ = running if self.base.moves else (None, None, 0.0, 1.0)
        c = self.base.sizes[2]
        stats = everyone.new_empty((5, c), dtype=dtype)
        key = (len(everyone), unbiased, mean is None, var is None)
        if key not in self.merges:
            constants = (eps, tl.float64 if dtype == torch.float64 else tl.float32, unbiased)
            self.merges[key] = Kernel(
                all_moments_kernel, (triton.cdiv(c, CHANNELS), 1, 1), 1, (len(everyone), c),
                (*constants, CHANNELS), self.base.device,
            )  # fmt: skip
        self.merges[key]((everyone, stats, mean, var), (float(momentum),))
        return stats, self.base.moves

    def apply(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
        residual: Tensor | None, stats: Tensor, spec: Any,
    ) -> Tensor:  # fmt: skip
        """y by the statistics of all processes."""
        _ = self.plan or self._planned()
        if self.base.loose:
            x, weight, bias, labels, residual = self.base._tidy(x, weight, bias, labels, residual)
        y = (
            torch.empty_like(x)
            if self.base.like
            else x.new_empty_strided(x.shape, self.base.stride)
        )
        inputs = (x, y, residual, weight, bias, labels)
        self.apply_to((*inputs, None, None, None, stats, None, None), (0.0, 1.0))
        return y

    def sums(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        labels: Tensor | None, residual: Tensor | None, stats: Tensor, spec: Any,
    ) -> tuple[Tensor, Callable[[Tensor], Grads]]:  # fmt: skip
        """Sums of gain * g and of that times x_hat, (2, C) float64; and what makes dx, dweight,
        dbias and the gradient of `residual` of their means over all processes' elements."""
        p = self.plan or self._planned()
        if self.base.loose:
            x, weight, bias, labels, residual = self.base._tidy(x, weight, bias, labels, residual)
        dy = dy if dy.dtype == self.base.dtype else dy.to(self.base.dtype)
        if dy.stride() != self.base.stride or dy.is_neg() or not dy.data_ptr():
            dy = placed(dy, self.base.stride)
        inputs, (n, _, c) = (x, dy, residual, weight, bias, labels, stats), self.base.sizes
        each = x.new_empty((2, p.parts, n, c), dtype=self.base.statistics)
        totals = x.new_empty((2, c), dtype=torch.float64)
        self.sum((*inputs, each))
        self.add((each, weight, labels, totals))

        def finish(means: Tensor) -> Grads:
            dx, g = torch.empty_like(dy), None if residual is None else torch.empty_like(dy)
            dweight, dbias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
            self.dx((*inputs, None, means.to(self.base.statistics).contiguous(), dx, g))
            if self.base.tables:
                self.table((each, labels, dweight, dbias))
            return dx, dweight, dbias, g

        return totals, finish


_parts: dict[Any, Pieces] = {}


def parts(tensors: tuple[Tensor | None, ...], spec: Any) -> Pieces:
    """The pieces for such tensors, those of `Launches`."""
    key = (spec, *map(facts, tensors))
    known = _parts.get(key)
    if known is None:
        if len(_parts) >= KEPT:
            _parts.clear()
        known = _parts[key] = Pieces(tensors, spec)
    return known
