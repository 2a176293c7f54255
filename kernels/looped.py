"""A program for a set that registers do not hold: it reads the set twice, in one kernel each way.

The second time it goes backwards, from what it read last, much of which the L2 cache still has.
"""

import triton
import triton.language as tl

from gannorm.kernels.tile import (
    affine,
    apply_tile,
    at,
    first_elements,
    grad_tile,
    load_statistics,
    normalized,
    pivot,
    program_sets,
    reciprocal,
    set_total,
    statistics,
    store_statistics,
    tile_elements,
    tile_planes,
    update_running,
    wide,
)


@triton.jit
def _tile(
    number, g0, n, planes, sets, size,
    DOMAIN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Sample, channel, positions and masks of a tile of the set, row by row of planes."""
    across = (size + BLOCK_S - 1) // BLOCK_S
    row = number // across
    sample, channel, live = tile_planes(
        row * BLOCK_P, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN
    )
    s, mask = tile_elements((number - row * across) * BLOCK_S, size, live, BLOCK_S, EVEN)
    return sample, channel, live, s, mask


@triton.jit
def _count(planes, size, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    """Tiles of a set."""
    return (planes + BLOCK_P - 1) // BLOCK_P * ((size + BLOCK_S - 1) // BLOCK_S)


@triton.jit
def _moments(
    x_ptr, stride_n, stride_c, stride_s, first, scale, n, g0, planes, sets, size,
    DOMAIN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares around it (G,) float64 of (x - first) * scale over a set.

    Welford's update in every lane of the tile, so that the loop has no reduction; Chan's merge of
    the lanes at the end.
    """
    mean = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
    square = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
    met = tl.full([], 0.0, DTYPE) if EVEN else tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
    for number in tl.range(0, _count(planes, size, BLOCK_P, BLOCK_S), num_stages=STAGES):
        sample, channel, live, s, mask = _tile(
            number, g0, n, planes, sets, size, DOMAIN, BLOCK_P, BLOCK_G, BLOCK_S, EVEN
        )
        offsets = at(sample, channel, s, stride_n, stride_c, stride_s)
        x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy="evict_last").to(DTYPE)
        shifted = (x - first[None, :, None]) * scale
        if EVEN:
            met += 1.0
            delta = shifted - mean
            mean += delta * (1.0 / met)
            square += delta * (shifted - mean)
        else:  # lanes beyond a plane's end miss a turn
            met += tl.where(mask, 1.0, 0.0)
            delta = tl.where(mask, shifted - mean, 0.0)
            mean += delta / tl.maximum(met, 1.0)
            square += tl.where(mask, delta * (shifted - mean), 0.0)
    centre = set_total(mean * met) * reciprocal(planes, size)
    apart = mean - centre.to(DTYPE)[None, :, None]
    return centre, set_total(tl.where(met > 0, square + met * (apart * apart), 0.0))


@triton.jit
def _set_moments(
    x_ptr, stride_n, stride_c, stride_s, first, n, g0, planes, sets, size,
    DOMAIN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    mean, square = _moments(
        x_ptr, stride_n, stride_c, stride_s, first, 1.0, n, g0, planes, sets, size,
        DOMAIN, DTYPE, BLOCK_P, BLOCK_G, BLOCK_S, EVEN, STAGES,
    )  # fmt: skip
    huge = square == float("inf")
    if tl.max(huge.to(tl.int32), 0) > 0:  # squares beyond float32: again, at 2^-80
        small_mean, small_square = _moments(
            x_ptr, stride_n, stride_c, stride_s, first, 8.271806125530277e-25,
            n, g0, planes, sets, size,
            DOMAIN, DTYPE, BLOCK_P, BLOCK_G, BLOCK_S, EVEN, 1,
        )  # fmt: skip
        unscale = tl.full([], 1.2089258196146292e24, tl.float64)  # 2^80
        mean = tl.where(huge, small_mean * unscale, mean)
        square = tl.where(huge, small_square * unscale * unscale, square)
    return mean, square


@triton.jit
def looped_forward_kernel(
    x_ptr, y_ptr, residual_ptr,  # (N, C, S); residual may be None
    weight_ptr, bias_ptr, labels_ptr,  # (K, C), (K, C), (N,), or None
    stats_ptr,  # (4, total), written
    running_mean_ptr, running_var_ptr,  # (C,), moved, or None
    momentum, bessel,
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,  # of x; of all others
    samples, rows, channels, planes, sets, size, total,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    first = first_elements(
        x_ptr, x_stride_n, x_stride_c, n, g0, planes, sets, DOMAIN, BLOCK_G, DTYPE
    )
    offset, square = _set_moments(
        x_ptr, x_stride_n, x_stride_c, x_stride_s, first, n, g0, planes, sets, size,
        DOMAIN, DTYPE, BLOCK_P, BLOCK_G, BLOCK_S, EVEN, STAGES,
    )  # fmt: skip
    mean, error, rstd, var = statistics(first, offset, square, planes, size, EPS, DTYPE)
    store_statistics(stats_ptr, total, index, mine, mean, error, rstd, var)
    if running_mean_ptr is not None or running_var_ptr is not None:
        update_running(running_mean_ptr, running_var_ptr, index, mine, mean, var, momentum, bessel)
    start, rest = pivot(mean, error, rstd, var)
    tiles = _count(planes, size, BLOCK_P, BLOCK_S)
    for back in tl.range(0, tiles, num_stages=STAGES):
        sample, channel, live, s, mask = _tile(
            tiles - 1 - back, g0, n, planes, sets, size,
            DOMAIN, BLOCK_P, BLOCK_G, BLOCK_S, EVEN,
        )  # fmt: skip
        weight, bias = affine(
            weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
        )
        x = tl.load(
            x_ptr + at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0,
            eviction_policy="evict_first",
        ).to(DTYPE)  # fmt: skip
        apply_tile(
            x, weight, bias, start, rest, rstd, y_ptr, residual_ptr,
            at(sample, channel, s, stride_n, stride_c, stride_s), mask,
            ACTIVATION, SLOPE, RESIDUAL_AFTER, DTYPE,
        )  # fmt: skip


@triton.jit
def _gradients(
    x_ptr, dy_ptr, residual_ptr, weight, bias, start, rest, rstd, sample, channel, s, mask,
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """x_hat and dy behind the activation (P, G, S) of a tile, and the offsets of all but x."""
    offsets = at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s)
    x = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy=KEEP).to(DTYPE)
    x_hat = normalized(x, start, rest, rstd, mask)
    offsets = at(sample, channel, s, stride_n, stride_c, stride_s)
    g = grad_tile(
        dy_ptr, x_hat, weight, bias, residual_ptr, offsets, mask, ACTIVATION, SLOPE, DTYPE, KEEP
    )
    return x_hat, g, offsets


@triton.jit
def _grad_means(
    x_ptr, dy_ptr, residual_ptr, weight_ptr, bias_ptr, labels_ptr, sums_ptr, start, rest, rstd,
    n, g0, x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    samples, rows, channels, planes, sets, size,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    CUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Means of weight * g and weight * g * x_hat over the sets (G,); the planes' sums stored."""
    a = tl.zeros([BLOCK_P, BLOCK_G], DTYPE)
    b = tl.zeros([BLOCK_P, BLOCK_G], DTYPE)
    # Planes of several tiles are summed up in the lanes; else the loop is over rows of planes.
    for p in tl.range(0, planes, BLOCK_P, num_stages=1 if CUT else STAGES):
        sample, channel, live = tile_planes(p, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN)
        weight, bias = affine(
            weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
        )
        if CUT:
            g_lanes = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
            gx_lanes = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
            for s0 in tl.range(0, size, BLOCK_S, num_stages=STAGES):
                s, mask = tile_elements(s0, size, live, BLOCK_S, EVEN)
                x_hat, g, _ = _gradients(
                    x_ptr, dy_ptr, residual_ptr, weight, bias, start, rest, rstd,
                    sample, channel, s, mask,
                    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
                    ACTIVATION, SLOPE, DTYPE, "evict_last",
                )  # fmt: skip
                g_lanes += g
                gx_lanes += g * x_hat
        else:
            s, mask = tile_elements(0, size, live, BLOCK_S, EVEN)
            x_hat, g_lanes, _ = _gradients(
                x_ptr, dy_ptr, residual_ptr, weight, bias, start, rest, rstd,
                sample, channel, s, mask,
                x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
                ACTIVATION, SLOPE, DTYPE, "evict_last",
            )  # fmt: skip
            gx_lanes = g_lanes * x_hat
        g_sum, gx_sum = tl.sum(g_lanes, 2), tl.sum(gx_lanes, 2)
        if sums_ptr is not None:
            to = sums_ptr + sample * channels + channel
            tl.store(to, g_sum, mask=live)
            tl.store(to + wide(samples) * channels, gx_sum, mask=live)
        weight = tl.where(live, weight, 0.0)
        a += weight * g_sum
        b += weight * gx_sum
    elements = tl.full([], 1.0, DTYPE) * planes * size
    return tl.sum(a, 0) / elements, tl.sum(b, 0) / elements


@triton.jit
def looped_backward_kernel(
    x_ptr, dy_ptr, residual_ptr,  # (N, C, S); residual may be None
    weight_ptr, bias_ptr, labels_ptr,  # (K, C), (K, C), (N,), or None
    stats_ptr,  # (4, total)
    dx_ptr, g_ptr,  # (N, C, S), written, or None
    sums_ptr,  # (2, N, C), per-plane sums of g and g * x_hat, written, or None
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    samples, rows, channels, planes, sets, size, total,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    CUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    mean, error, rstd, var = load_statistics(stats_ptr, total, index, mine)
    start, rest = pivot(mean, error, rstd, var)
    a, b = _grad_means(
        x_ptr, dy_ptr, residual_ptr, weight_ptr, bias_ptr, labels_ptr, sums_ptr, start, rest, rstd,
        n, g0, x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
        samples, rows, channels, planes, sets, size,
        DOMAIN, ACTIVATION, SLOPE, DTYPE, BLOCK_P, BLOCK_G, BLOCK_S, EVEN, CUT, STAGES,
    )  # fmt: skip
    if dx_ptr is not None or g_ptr is not None:
        tiles = _count(planes, size, BLOCK_P, BLOCK_S)
        for back in tl.range(0, tiles, num_stages=STAGES):
            sample, channel, live, s, mask = _tile(
                tiles - 1 - back, g0, n, planes, sets, size,
                DOMAIN, BLOCK_P, BLOCK_G, BLOCK_S, EVEN,
            )  # fmt: skip
            weight, bias = affine(
                weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels,
                DTYPE,
            )  # fmt: skip
            x_hat, g, offsets = _gradients(
                x_ptr, dy_ptr, residual_ptr, weight, bias, start, rest, rstd,
                sample, channel, s, mask,
                x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
                ACTIVATION, SLOPE, DTYPE, "evict_first",
            )  # fmt: skip
            if g_ptr is not None:
                tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None:
                dx = g * weight[:, :, None] - a[None, :, None] - x_hat * b[None, :, None]
                dx = dx * rstd[None, :, None]
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
