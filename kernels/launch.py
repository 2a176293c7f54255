"""The launchers: outputs allocated, a plan chosen, kernels launched from a cache.

`forward` and `backward` take tensors on one device; `gannorm.functional` has checked them. x
(N, C, S) may lie anywhere; everything else that is of its size comes and goes in `dense_strides`:
channels_last where x is, else contiguous. `spec` is any object with groups, eps, activation,
negative_slope and residual_after_activation (`gannorm.reference.NormSpec`).
"""

import json
import math
from contextlib import nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from gannorm.kernels.held import held_backward_kernel, held_forward_kernel
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
HELD = 65536  # bytes of a statistics set, in the dtype of the statistics, that registers hold
TILE = 16384  # bytes, the same way, that a program of a split set handles at a time
LINE = 64  # elements that neighbouring threads should find next to each other
WAVES = 8  # programs for each processor of the GPU, at most, that split sets are cut into
MERGED = 16  # partials for each tile of a chunk, beyond which they are merged once, for 2% less
MERGED_SETS = 4  # sets that a merging program takes: 32 bytes of float64 side by side
GRID = 65535  # programs along the second axis of a CUDA grid, at most
SUMMED_ROWS = 16  # rows of a table whose gradients the programs of a channel add up themselves


class Plan(NamedTuple):
    """How the programs share the work; see `gannorm.kernels.tile` for the three dimensions."""

    held: bool
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


class Bounds(NamedTuple):
    """What `plan` goes by: the constants above, or what `benchmarks.tune` found to be faster."""

    held: int
    tile: int
    waves: int
    warps: float  # times the formula's


def bounds_key(
    batch: bool, sets: int, planes: int, size: int, itemsize: int, channels_last: bool
) -> str:
    """Which sets a line of plans.json is for: so many in all, up to the next power of two."""
    kind, layout = ("batch" if batch else "sample"), ("last" if channels_last else "first")
    count = triton.next_power_of_2(sets)
    return f"{kind} {count} of {planes}x{size} {8 * itemsize} bits channels {layout}"


@cache
def tuned() -> dict[str, dict[str, list[float]]]:
    """plans.json: by the GPU's name and `bounds_key`, the bounds."""
    return json.loads(PLANS.read_text(encoding="utf-8")) if PLANS.exists() else {}


@lru_cache(maxsize=4096)
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
    held_bytes, tile_bytes, waves, factor = bounds or Bounds(HELD, TILE, WAVES, 1.0)
    rounded = triton.next_power_of_2
    # Neighbouring elements in memory: of a plane, or of the channels.
    run = 1 if channels_last and batch else planes if channels_last else size
    tile = rounded(planes) * rounded(size)
    group, limit = 1, rounded(sets)
    while group < limit and (group * run < LINE or tile * group < 1024):
        if tile * group * 2 * itemsize > held_bytes:
            break
        group *= 2
    side_by_side = group * run >= 32 or group == limit
    held = not given and tile * group * itemsize <= held_bytes and side_by_side
    if held:
        block_p, block_s = rounded(planes), rounded(size)
    else:
        room = tile_bytes // itemsize
        group = 1
        while group < limit and group * run < LINE:
            group *= 2
        block_s = min(rounded(size), max(room // group, 1))
        block_p = min(rounded(planes), max(room // group // block_s, 1))
        if channels_last and not batch:  # the channels of a group lie next to each other
            block_p = min(rounded(planes), LINE)
            block_s = min(rounded(size), max(room // group // block_p, 1))
        # Many samples: fewer, wider rows of tiles, as a grid's second axis is short.
        while triton.cdiv(planes, block_p) > GRID and 1 < block_s < size:
            block_p, block_s = 2 * block_p, block_s // 2
    even = planes % block_p == 0 and sets % group == 0 and size % block_s == 0
    warps = max(1, min(16 if held else 8, block_p * group * block_s * itemsize // 2048))
    warps = max(1, min(16, int(warps * factor)))
    blocks = triton.cdiv(sets, group) * (1 if batch else samples)
    if held:
        return Plan(True, block_p, group, block_s, even, warps, blocks)
    cut = block_s < size
    tiles = triton.cdiv(size, block_s) if cut else triton.cdiv(planes, block_p)
    rows = triton.cdiv(planes, block_p) if cut else 1
    loops = max(1, min(tiles, tiles * rows * blocks // (waves * processors)))
    parts = triton.cdiv(tiles, loops) if cut else 1
    chunks = rows * parts if cut else triton.cdiv(tiles, loops)
    return Plan(False, block_p, group, block_s, even, warps, blocks, chunks, loops, parts, cut)


def dense_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of a dense (N, C, S): channels_last where x is, else contiguous."""
    n, c, size = x.shape
    last = (size * c, 1, c)
    stands = x.stride()[1:] == last[1:] and (n == 1 or x.stride(0) == last[0])
    return last if size > 1 and c > 1 and stands else (c * size, size, 1)


def _dense(t: Tensor, strides: tuple[int, int, int]) -> Tensor:
    pairs = zip(t.shape, t.stride(), strides, strict=True)
    if all(a == b or size == 1 for size, a, b in pairs):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H100's
    return torch.cuda.get_device_properties(device).multi_processor_count


def _bounds(device: torch.device, key: str) -> Bounds | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = tuned().get(name, {}).get(key)
    return None if found is None else Bounds(int(found[0]), int(found[1]), int(found[2]), found[3])


_runners: dict[Any, Any] = {}


def _launch(
    kernel: Any, grid: tuple[int, int, int], warps: int, pointers: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...], constants: tuple[Any, ...], floats: tuple[float, ...] = (),
) -> None:  # fmt: skip
    """kernel[grid](*pointers, *floats, *numbers, *constants), most of it remembered.

    Triton's own dispatch examines every argument of every call. Here a call like an earlier one
    (same integers and constants, same dtypes, same alignment) finds its compiled kernel at once.
    """
    kinds = tuple([None if p is None else (p.dtype, p.data_ptr() % 16 == 0) for p in pointers])
    device = pointers[0].device.index  # type: ignore[union-attr]
    key = (kernel, grid, warps, numbers, constants, kinds, device)
    runner = _runners.get(key)
    arguments = (*pointers, *floats, *numbers, *constants)
    elsewhere = device is not None and device != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        if runner is not None:
            runner(*arguments)
            return
        compiled = kernel[grid](*arguments, **_options(warps))
    if hasattr(compiled, "run"):  # not in the interpreter
        _runners[key] = compiled[grid]


def _options(warps: int) -> dict[str, int]:
    """Left alone, NVIDIA's assembler spills a few registers to fit more programs on a processor."""
    if knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {"num_warps": warps}
    return {"num_warps": warps, "maxnreg": min(255, 2048 // warps)}


class _Call(NamedTuple):
    """What the launches of one norm have in common."""

    plan: Plan
    strides: tuple[int, int, int]
    layout: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]  # of a statistic
    domain: tuple[int, ...]  # planes, sets, size, sets in all
    statistics: torch.dtype
    dtype: Any


@lru_cache(maxsize=4096)
def _call(
    shape: tuple[int, int, int], stride: tuple[int, int, int], strides: tuple[int, int, int],
    dtype: torch.dtype, groups: int, rows: int, given: bool, device: torch.device,
) -> _Call:  # fmt: skip
    n, c, size = shape
    planes, sets = (c // groups, groups) if groups else (n, c)
    double = dtype == torch.float64
    last = strides[1] == 1 and c > 1
    itemsize = 8 if double else 4
    stat_shape = (n, groups) if groups else (c,)
    key = bounds_key(not groups, math.prod(stat_shape), planes, size, itemsize, last)
    chosen = plan(
        not groups, n, planes, sets, size, itemsize, last, given, _processors(device),
        _bounds(device, key),
    )  # fmt: skip
    return _Call(
        chosen, strides, (*stride, *strides), (n, rows, c), stat_shape,
        (planes, sets, size, math.prod(stat_shape)),
        _statistics_dtype(dtype), tl.float64 if double else tl.float32,
    )  # fmt: skip


def forget() -> None:
    """Plan anew from here on: the bounds above or the table of plans have changed."""
    plan.cache_clear()
    _call.cache_clear()


def _prepare(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Any, given: bool
) -> _Call:
    table = bias if weight is None else weight
    rows = 1 if table is None else table.shape[0]
    return _call(
        x.shape, x.stride(), dense_strides(x), x.dtype, spec.groups, rows, given, x.device
    )  # fmt: skip


def _merging(call: _Call) -> tuple[int, int, int]:
    """The grid of a kernel that merges partials."""
    _, sets, _, total = call.domain
    return triton.cdiv(sets, MERGED_SETS) * (total // sets), 1, 1


def _domain(x: Tensor, spec: Any) -> str:
    return "batch" if spec.groups == 0 else "plane" if spec.groups == x.shape[1] else "group"


def forward(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,  # (N,)
    residual: Tensor | None,  # (N, C, S)
    given: tuple[Tensor, Tensor] | None,  # mean and variance (C,): evaluation mode
    spec: Any,
    running: tuple[Tensor | None, Tensor | None, float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and the statistics: mean, its rounding error, rstd, biased variance; (4, C) or
    (4, N, groups).

    running: running mean and variance (C,) to move, by which share, and what makes the variance
        the running one (n / (n - 1), or 1). Statistics across the batch only.
    """
    if not x.numel():
        shape = (x.shape[0], spec.groups) if spec.groups else (x.shape[1],)
        return torch.empty_like(x), x.new_zeros((4, *shape), dtype=_statistics_dtype(x.dtype))
    call = _prepare(x, weight, bias, spec, given is not None)
    p = call.plan
    y = torch.empty_strided(x.shape, call.strides, dtype=x.dtype, device=x.device)
    stats = torch.empty((4, *call.shape), dtype=call.statistics, device=x.device)
    if residual is not None:
        residual = _dense(residual, call.strides)
    mean, var, *shares = running or (None, None, 0.0, 1.0)
    factors = tuple(map(float, shares))  # an integer would be compiled in, as a constant
    blocks = (p.block_p, p.block_g, p.block_s, p.even)
    domain = _domain(x, spec)
    epilogue = (domain, spec.activation, spec.negative_slope, spec.eps, call.dtype,
                spec.residual_after_activation)  # fmt: skip
    inputs = (x, y, residual, weight, bias, labels)
    if p.held:
        _launch(
            held_forward_kernel, (p.blocks, 1, 1), p.warps, (*inputs, stats, mean, var),
            (*call.layout, *call.sizes, *call.domain), (*epilogue, *blocks), factors,
        )  # fmt: skip
        return y, stats
    grid, partial = (p.blocks, p.chunks, 1), None
    if given is None:
        total = call.domain[3]
        partial = torch.empty((2, p.chunks, total), dtype=torch.float64, device=x.device)
        _launch(
            split_moments_kernel, grid, p.warps, (x, partial),
            (*call.layout[:3], *call.domain, p.chunks, p.loops),
            (domain, call.dtype, *blocks, p.cut),
        )  # fmt: skip
        if p.chunks * p.block_g > MERGED * p.loops:
            _launch(
                split_merge_kernel, _merging(call), 4, (x, partial, stats, mean, var),
                (*call.layout[:2], *call.domain, p.chunks, p.loops),
                (domain, spec.eps, call.dtype, p.block_p, MERGED_SETS, p.block_s, p.cut),
                factors,
            )  # fmt: skip
            partial = mean = var = None
    _launch(
        split_apply_kernel, grid, p.warps,
        (*inputs, partial, *(given or (None, None)), stats, mean, var),
        (*call.layout, *call.sizes, *call.domain, p.chunks, p.loops),
        (*epilogue, *blocks, p.cut), factors,
    )  # fmt: skip
    return y, stats


def backward(
    dy: Tensor,  # (N, C, S)
    x: Tensor,
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # only where the activation's derivative depends on it
    stats: Tensor,  # as `forward` returned them
    spec: Any,
    given: bool,  # the statistics were
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, and the gradient of `residual`."""
    dweight, dbias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    if not x.numel():
        for table in (dweight, dbias):
            if table is not None:
                table.zero_()
        # New tensors: a custom op's outputs may not be its inputs.
        return torch.empty_like(dy), dweight, dbias, torch.empty_like(dy)
    call = _prepare(x, weight, bias, spec, given)
    p = call.plan
    dy = _dense(dy, call.strides)
    dx = torch.empty_like(dy) if need_dx else None
    g = None
    if residual is not None:
        residual, g = _dense(residual, call.strides), torch.empty_like(dy)
    domain, tables = _domain(x, spec), weight is not None or bias is not None
    blocks = (p.block_p, p.block_g, p.block_s, p.even)
    constants = (domain, spec.activation, spec.negative_slope, call.dtype)
    inputs = (x, dy, residual, weight, bias, labels, stats)
    numbers = (*call.layout, *call.sizes, *call.domain)
    summed = p.held and domain == "batch" and call.sizes[1] <= SUMMED_ROWS and tables
    sums = None
    if not summed and (tables or not (p.held or given)):
        n, c, _ = x.shape
        sums = torch.empty((2, p.parts, n, c), dtype=call.statistics, device=x.device)
    if p.held:
        _launch(
            held_backward_kernel, (p.blocks, 1, 1), p.warps,
            (*inputs, dx, g, sums, dweight if summed else None, dbias if summed else None),
            numbers, (*constants, *blocks, summed),
        )  # fmt: skip
    else:
        grid = (p.blocks, p.chunks, 1)
        split = (*numbers, p.parts, p.loops), (*constants, *blocks, p.cut)
        if sums is not None:
            _launch(split_sums_kernel, grid, p.warps, (*inputs, sums), *split)
        if need_dx or g is not None:
            partials, means = (None, None) if given else (sums, None)
            if partials is not None and call.domain[0] * p.parts * p.block_g > 2 * MERGED * p.loops:
                means = torch.empty((2, call.domain[3]), dtype=call.statistics, device=x.device)
                _launch(
                    split_reduce_kernel, _merging(call), 4, (sums, weight, labels, means),
                    (*call.sizes, *call.domain, p.parts), (domain, MERGED_SETS, call.dtype),
                )  # fmt: skip
                partials = None
            _launch(split_dx_kernel, grid, p.warps, (*inputs, partials, means, dx, g), *split)
    if tables and not summed:
        assert sums is not None
        n, rows, c = call.sizes
        width, height = 64, 16
        _launch(
            table_grad_kernel, (rows, triton.cdiv(c, width), 1), 4, (sums, labels, dweight, dbias),
            (n, c, p.parts), (call.dtype, height, width),
        )  # fmt: skip
    return dx, dweight, dbias, g
