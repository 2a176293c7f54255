"""The launchers: outputs allocated, a plan chosen, kernels launched from a cache.

They take torch's shapes: x (N, C, ...), an affine (C,) or (K, C), all on one device;
`gannorm.functional` has checked them. x is read where it lies if its planes are dense, or if it is
channels_last; everything else of its size comes and goes in `dense_strides`: channels_last where x
is, else contiguous. `spec` is any object with groups, eps, activation, negative_slope and
residual_after_activation (`gannorm.norms.composed.NormSpec`).

What a call needs besides its tensors' addresses is worked out once for tensors of one kind (shapes,
strides, dtypes, device) and kept: `Launches`.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gannorm.kernels.layout import contiguous, dense_strides, flat_strides, is_ready, placed
from gannorm.kernels.looped import looped_backward_kernel, looped_forward_kernel
from gannorm.kernels.persistent import persistent_backward_kernel, persistent_forward_kernel
from gannorm.kernels.runner import Kernel
from gannorm.kernels.split import (
    split_apply_kernel,
    split_dx_kernel,
    split_merge_kernel,
    split_moments_kernel,
    split_reduce_kernel,
    split_sums_kernel,
    table_grad_kernel,
)

PLANS = Path(__file__).with_name("plans.json")
PERSISTENT = 65536  # bytes of a statistics set, in the dtype of the statistics, that registers hold
TILE = 16384  # bytes, the same way, that a program of a split set handles at a time
LINE = 64  # elements that neighbouring threads should find next to each other
LOOPED = 32768  # bytes, where a program has its sets to itself
STAGES = 1  # tiles that such a program has under way, more of them by way of shared memory
ENOUGH = 0.45  # such programs for each processor, below which sets are split
LONG = 2**19  # bytes of their sets, above which it takes 4 of them: the last would run on alone
WAVES = 8  # programs for each processor of the GPU, at most, that split sets are cut into
MERGED = 16  # partials for each tile of a chunk, beyond which they are merged once, for 2% less
MERGED_SETS = 4  # sets that a merging program takes: 32 bytes of float64 side by side
GRID = 65535  # programs along the second axis of a CUDA grid, at most
TABLE_SUMS, TABLE_COLUMNS = 64, 32  # that a program of a table's gradient takes at a time
SUMMED_ROWS = 16  # rows of a table whose gradients the programs of a channel add up themselves
KEPT = 4096  # kinds of calls that are remembered

Given = tuple[Tensor, Tensor]  # mean and variance (C,): evaluation mode
# Running mean and variance (C,), the share by which they move, biased variance to running one.
Running = tuple[Tensor | None, Tensor | None, float, float]


class Plan(NamedTuple):
    """How the programs share the work; see `gannorm.kernels.tile` for the three dimensions."""

    persistent: bool
    block_p: int
    block_g: int
    block_s: int
    even: bool  # the blocks cover the sets exactly: no masks
    warps: int
    blocks: int  # programs side by side, for all sets
    chunks: int = 1  # programs for each of them
    loops: int = 1  # tiles in a chunk
    parts: int = 1  # chunks of a plane
    cut: bool = False  # a tile is less than a plane
    stages: int = 0  # tiles under way where programs loop over their sets; 0: they do not


class Bounds(NamedTuple):
    """What `plan` goes by: the constants above, or what `benchmarks.tune` found to be faster."""

    persistent: int
    tile: int  # 0: LOOPED or TILE
    waves: int
    warps: float  # times the formula's
    stages: int = 0  # of looped plans; 0: sets are split


def formula(batch: bool) -> Bounds:  # across the batch sums of tables take registers too
    return Bounds(PERSISTENT // 2 if batch else PERSISTENT, 0, WAVES, 1.0, STAGES)


def bounds_key(
    batch: bool, sets: int, planes: int, size: int, itemsize: int, channels_last: bool
) -> str:
    """Which sets a line of plans.json is for: so many in all, up to the next power of two."""
    kind, layout = ("batch" if batch else "sample"), ("last" if channels_last else "first")
    count = triton.next_power_of_2(sets)
    return f"{kind} {count} of {planes}x{size} {8 * itemsize} bits channels {layout}"


@cache
def tuned() -> dict[str, dict[str, list[Any]]]:
    """plans.json: by the GPU's name and `bounds_key`, the bounds."""
    return json.loads(PLANS.read_text(encoding="utf-8")) if PLANS.exists() else {}


def _cut(planes: int, size: int, room: int, together: bool) -> tuple[int, int]:
    """Planes and elements of each in a tile of `room`; `together`: planes lie side by side."""
    most_p, most_s = triton.next_power_of_2(planes), triton.next_power_of_2(size)
    block_s = min(most_s, max(room // (min(most_p, LINE) if together else 1), 1))
    block_p = min(most_p, LINE if together else max(room // block_s, 1))
    # Many samples: fewer, wider rows of tiles, as a grid's second axis is short.
    while triton.cdiv(planes, block_p) > GRID and 1 < block_s < size:
        block_p, block_s = 2 * block_p, block_s // 2
    return block_p, block_s


def plan(
    batch: bool,  # statistics across the batch, else inside each sample
    samples: int,
    planes: int,  # of a set
    sets: int,  # of a sample, or of all samples
    size: int,
    itemsize: int,  # of the statistics
    channels_last: bool = False,
    given: bool = False,  # statistics are given: every element is on its own
    processors: int = 132,
    bounds: Bounds | None = None,
) -> Plan:
    """The plan for sets of `planes` planes of `size` elements."""
    persistent_bytes, tile_bytes, waves, factor, stages = bounds or formula(batch)
    rounded = triton.next_power_of_2
    # Neighbouring elements in memory: of a plane, or of the channels.
    run = 1 if channels_last and batch else planes if channels_last else size
    tile = rounded(planes) * rounded(size)
    group, limit = 1, rounded(sets)
    while group < limit and (group * run < LINE or tile * group < 1024):
        if tile * group * 2 * itemsize > persistent_bytes:
            break
        group *= 2
    side_by_side = group * run >= 32 or group == limit
    persistent = not given and tile * group * itemsize <= persistent_bytes and side_by_side
    block_p, block_s, looped = rounded(planes), rounded(size), False
    if not persistent:
        group = 1
        while group < limit and group * run < LINE:
            group *= 2
        programs = triton.cdiv(sets, group) * (1 if batch else samples) / processors
        long = planes * size * group * itemsize > LONG
        looped = stages > 0 and not given and programs >= (4 if long else ENOUGH)
        room = (tile_bytes or (LOOPED if looped else TILE)) // itemsize
        block_p, block_s = _cut(planes, size, room // group, channels_last and not batch)
    even = planes % block_p == 0 and sets % group == 0 and size % block_s == 0
    warps = max(1, min(16 if persistent else 8, block_p * group * block_s * itemsize // 2048))
    warps, cut = max(1, min(16, int(warps * factor))), block_s < size
    blocks = triton.cdiv(sets, group) * (1 if batch else samples)
    if persistent:
        return Plan(True, block_p, group, block_s, even, warps, blocks)
    if looped:
        return Plan(False, block_p, group, block_s, even, warps, blocks, cut=cut, stages=stages)
    tiles = triton.cdiv(size, block_s) if cut else triton.cdiv(planes, block_p)
    rows = triton.cdiv(planes, block_p) if cut else 1
    loops = max(1, min(tiles, tiles * rows * blocks // (waves * processors)))
    parts = triton.cdiv(tiles, loops) if cut else 1
    chunks = rows * parts if cut else triton.cdiv(tiles, loops)
    return Plan(False, block_p, group, block_s, even, warps, blocks, chunks, loops, parts, cut)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H100's
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bounds(device: torch.device, key: str) -> Bounds | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    best = tuned().get(name, {}).get(key)
    return None if best is None else Bounds(*best)


class Launches:
    """The launches of a norm on tensors of one kind.

    tensors: x, weight, bias, labels, residual, and the statistics that are given or run; those of
        a later call are of the same shapes, strides and dtypes.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], spec: Any, given: bool) -> None:
        x, weight, bias, labels, residual, mean, var = tensors
        assert x is not None
        n, c, *plane = x.shape
        groups, size = spec.groups, math.prod(plane)
        self.spec, self.given, self.device, self.dtype = spec, given, x.device, x.dtype
        self.stride = dense_strides(x)  # of all that is of x's size, but x
        self.strides = (*self.stride[:2], self.stride[-1] if plane else 1)  # the same, (N, C, S)
        flat = None if x.is_neg() else flat_strides(x)
        self.copied, self.x_strides = flat is None, flat or self.strides
        self.like = x.stride() == self.stride
        # Whether anything has to be copied before a kernel can have it.
        tables = (weight, bias, labels, *((mean, var) if given else ()))
        aside = residual is not None and (residual.is_neg() or residual.stride() != self.stride)
        self.loose = self.copied or aside or not all(map(is_ready, tables))
        # The share by which running statistics move comes as a float32.
        persistent = not given and not groups and x.dtype != torch.float64
        self.moves = persistent and is_ready(mean) and is_ready(var)
        self.statistics = _statistics_dtype(x.dtype)
        table = bias if weight is None else weight
        rows = table.shape[0] if table is not None and table.dim() == 2 else 1
        self.tables, self.sizes = table is not None, (n, rows, c)
        self.shape = (n, groups) if groups else (c,)  # of a statistic
        planes, sets = (c // groups, groups) if groups else (n, c)
        self.domain = (planes, sets, size, math.prod(self.shape))
        self.kind = "batch" if groups == 0 else "plane" if groups == c else "group"
        self.plan: Plan | None = None

    def _planned(self) -> Plan:
        """Choose the plan, and with it the kernels; none is compiled before it is called."""
        n, rows, c = self.sizes
        planes, sets, size, total = self.domain
        batch, last = self.kind == "batch", self.strides[1] == 1 and c > 1
        itemsize = self.statistics.itemsize
        bounds = _bounds(self.device, bounds_key(batch, total, planes, size, itemsize, last))
        p = plan(
            batch, n, planes, sets, size, itemsize, last, self.given, _processors(self.device),
            bounds,
        )  # fmt: skip
        spec, dtype = self.spec, tl.float64 if itemsize == 8 else tl.float32
        numbers = (*self.x_strides, *self.strides, *self.sizes, *self.domain)
        slope = (self.kind, spec.activation, spec.negative_slope)
        blocks = (p.block_p, p.block_g, p.block_s, p.even)
        apply = (*slope, spec.eps, dtype, spec.residual_after_activation, *blocks)
        backward: tuple[Any, ...] = (*slope, dtype, *blocks)
        self.summed = p.persistent and batch and rows <= SUMMED_ROWS and self.tables
        nothing: Kernel | None = None
        self.moments = self.merge = self.sum = self.reduce = nothing
        if p.persistent:
            grid = (p.blocks, 1, 1)
            self.apply = self._kernel(persistent_forward_kernel, grid, p.warps, numbers, apply)
            backward, kernel = (*backward, self.summed), persistent_backward_kernel
        elif p.stages:
            grid = (p.blocks, 1, 1)
            self.apply = self._kernel(
                looped_forward_kernel, grid, p.warps, numbers, (*apply, p.stages)
            )
            backward, kernel = (*backward, p.cut, p.stages), looped_backward_kernel
        else:
            self._split(p, numbers, dtype, apply, backward)
            grid, numbers = (p.blocks, p.chunks, 1), (*numbers, p.parts, p.loops)
            backward, kernel = (*backward, p.cut), split_dx_kernel
        # Without dx, with it.
        self.dx_kernels = [self._kernel(kernel, grid, p.warps, numbers, backward) for _ in range(2)]
        self.table = self._kernel(
            table_grad_kernel, (rows, triton.cdiv(c, TABLE_COLUMNS), 1), 4, (n, c, p.parts),
            (dtype, min(TABLE_SUMS, triton.next_power_of_2(n)), TABLE_SUMS, TABLE_COLUMNS),
        )  # fmt: skip
        self.plan = p
        return p

    def _split(
        self, p: Plan, numbers: tuple[int, ...], dtype: Any, apply: tuple[Any, ...],
        backward: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """The kernels of a split plan, but for dx."""
        planes, sets, _, total = self.domain
        grid, merging = (p.blocks, p.chunks, 1), triton.cdiv(sets, MERGED_SETS) * (total // sets)
        chunks, parts = (p.chunks, p.loops), (p.parts, p.loops)
        self.apply = self._kernel(
            split_apply_kernel, grid, p.warps, (*numbers, *chunks), (*apply, p.cut)
        )
        if self.tables or not self.given:
            self.sum = self._kernel(
                split_sums_kernel, grid, p.warps, (*numbers, *parts), (*backward, p.cut)
            )
        if self.given:
            return
        self.moments = self._kernel(
            split_moments_kernel, grid, p.warps, (*self.x_strides, *self.domain, *chunks),
            (self.kind, dtype, p.block_p, p.block_g, p.block_s, p.even, p.cut),
        )  # fmt: skip
        if p.chunks * p.block_g > MERGED * p.loops:
            self.merge = self._kernel(
                split_merge_kernel, (merging, 1, 1), 4,
                (*self.x_strides[:2], *self.domain, *chunks),
                (self.kind, self.spec.eps, dtype, p.block_p, MERGED_SETS, p.block_s, p.cut),
            )  # fmt: skip
        if planes * p.parts * p.block_g > 2 * MERGED * p.loops:
            self.reduce = self._kernel(
                split_reduce_kernel, (merging, 1, 1), 4, (*self.sizes, *self.domain, p.parts),
                (self.kind, MERGED_SETS, dtype),
            )  # fmt: skip

    def _kernel(
        self, kernel: Any, grid: tuple[int, int, int], warps: int, numbers: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> Kernel:  # fmt: skip
        return Kernel(kernel, grid, warps, numbers, constants, self.device)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
        residual: Tensor | None, mean: Tensor | None, var: Tensor | None,
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y and the statistics, as `forward` below; mean and var: given, or those to move."""
        p = self.plan or self._planned()
        if self.loose:
            x, weight, bias, labels, residual = self._tidy(x, weight, bias, labels, residual)
            mean, var = (contiguous(mean), contiguous(var)) if self.given else (mean, var)
        y = torch.empty_like(x) if self.like else x.new_empty_strided(x.shape, self.stride)
        stats = x.new_empty((4, *self.shape), dtype=self.statistics)
        if not (self.given or self.moves):
            mean = var = None
        inputs = (x, y, residual, weight, bias, labels)
        if p.persistent or p.stages:
            self.apply((*inputs, stats, mean, var), factors)
            return y, stats
        if self.given:
            self.apply((*inputs, None, mean, var, stats, None, None), factors)
            return y, stats
        assert self.moments is not None
        partial = x.new_empty((2, p.chunks, self.domain[3]), dtype=torch.float64)
        self.moments((x, partial))
        if self.merge is not None:
            self.merge((x, partial, stats, mean, var), factors)
            self.apply((*inputs, None, None, None, stats, None, None), factors)
        else:
            self.apply((*inputs, partial, None, None, stats, mean, var), factors)
        return y, stats

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        labels: Tensor | None, residual: Tensor | None, stats: Tensor, need_dx: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """As `backward` below."""
        p = self.plan or self._planned()
        if self.loose:
            x, weight, bias, labels, residual = self._tidy(x, weight, bias, labels, residual)
        if dy.dtype != self.dtype:
            dy = dy.to(self.dtype)
        if dy.stride() != self.stride or dy.is_neg() or not dy.data_ptr():
            dy = placed(dy, self.stride)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        dx = torch.empty_like(dy) if need_dx else None
        g = None if residual is None else torch.empty_like(dy)
        inputs = (x, dy, residual, weight, bias, labels, stats)
        sums = None
        if self.sum is not None or (self.tables and not self.summed):
            n, _, c = self.sizes
            sums = x.new_empty((2, p.parts, n, c), dtype=self.statistics)
        if p.persistent:
            tables = (dweight, dbias) if self.summed else (None, None)
            self.dx_kernels[need_dx]((*inputs, dx, g, sums, *tables))
        elif p.stages:
            self.dx_kernels[need_dx]((*inputs, dx, g, sums))
        else:
            if self.sum is not None:
                self.sum((*inputs, sums))
            if need_dx or g is not None:
                partials, means = None if self.given else sums, None
                if self.reduce is not None:
                    means = x.new_empty((2, self.domain[3]), dtype=self.statistics)
                    self.reduce((sums, weight, labels, means))
                    partials = None
                self.dx_kernels[need_dx]((*inputs, partials, means, dx, g))
        if self.tables and not self.summed:
            self.table((sums, labels, dweight, dbias))
        return dx, dweight, dbias, g

    def _tidy(self, x: Tensor, *others: Tensor | None) -> Any:
        *tables, residual = others
        if self.copied:
            x = placed(x, self.stride)
        if residual is not None:
            residual = placed(residual, self.stride)
        return x, *map(contiguous, tables), residual


_launches: dict[Any, Launches] = {}


def forget() -> None:
    """Plan anew from here on: the bounds above, or the table of plans, have changed."""
    for known in _launches.values():
        known.plan = None


def facts(t: Tensor | None) -> Any:
    """What the launches of a call depend on."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.is_neg())


def launches(tensors: tuple[Tensor | None, ...], spec: Any, given: bool) -> Launches:
    """The launches for such tensors, those of `Launches`."""
    key = (spec, given, *map(facts, tensors))
    known = _launches.get(key)
    if known is None:
        if len(_launches) >= KEPT:
            _launches.clear()
        known = _launches[key] = Launches(tensors, spec, given)
    return known


def forward(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,) or (K, C)
    bias: Tensor | None,
    labels: Tensor | None,  # (N,)
    residual: Tensor | None,  # as x
    given: Given | None,
    spec: Any,
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and the statistics: mean, its rounding error, rstd, biased variance; (4, C) or
    (4, N, groups).

    running: statistics across the batch that are to be moved.
    """
    if not x.numel():
        shape = (x.shape[0], spec.groups) if spec.groups else (x.shape[1],)
        return torch.empty_like(x), x.new_zeros((4, *shape), dtype=_statistics_dtype(x.dtype))
    mean, var, *shares = given or running or (None, None)
    known = launches((x, weight, bias, labels, residual, mean, var), spec, given is not None)
    momentum, bessel = shares or (0.0, 1.0)
    return known.forward(
        x, weight, bias, labels, residual, mean, var, (float(momentum), float(bessel))
    )


def backward(
    dy: Tensor,  # (N, C, ...)
    x: Tensor,
    weight: Tensor | None,  # (C,) or (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # only where the activation's derivative depends on it
    stats: Tensor,  # as `forward` returned them
    spec: Any,
    given: bool,  # the statistics were
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, and the gradient of `residual`."""
    if not x.numel():
        dweight, dbias = (None if t is None else torch.zeros_like(t) for t in (weight, bias))
        # New tensors: a custom op's outputs may not be its inputs.
        return torch.empty_like(dy), dweight, dbias, torch.empty_like(dy)
    known = launches((x, weight, bias, labels, residual, None, None), spec, given)
    return known.backward(dy, x, weight, bias, labels, residual, stats, need_dx)
