"""A whole statistics set in registers: read once, written once, one kernel each way."""

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
    sum_of_squares,
    tile_elements,
    tile_planes,
    update_running,
    wide,
)


@triton.jit
def persistent_forward_kernel(
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
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    sample, channel, live = tile_planes(0, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN)
    s, mask = tile_elements(0, size, live, BLOCK_S, EVEN)
    x = tl.load(
        x_ptr + at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0
    ).to(DTYPE)
    weight, bias = affine(
        weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
    )
    first = first_elements(
        x_ptr, x_stride_n, x_stride_c, n, g0, planes, sets, DOMAIN, BLOCK_G, DTYPE
    )
    shifted = tl.where(mask, x - first[None, :, None], 0.0)
    offset = set_total(shifted) * reciprocal(planes, size)
    square = sum_of_squares(tl.where(mask, shifted - offset.to(DTYPE)[None, :, None], 0.0))
    mean, error, rstd, var = statistics(first, offset, square, planes, size, EPS, DTYPE)
    store_statistics(stats_ptr, total, index, mine, mean, error, rstd, var)
    if running_mean_ptr is not None or running_var_ptr is not None:
        update_running(running_mean_ptr, running_var_ptr, index, mine, mean, var, momentum, bessel)
    start, rest = pivot(mean, error, rstd, var)
    apply_tile(
        x, weight, bias, start, rest, rstd, y_ptr, residual_ptr,
        at(sample, channel, s, stride_n, stride_c, stride_s), mask,
        ACTIVATION, SLOPE, RESIDUAL_AFTER, DTYPE,
    )  # fmt: skip


@triton.jit
def persistent_backward_kernel(
    x_ptr, dy_ptr, residual_ptr,  # (N, C, S); residual may be None
    weight_ptr, bias_ptr, labels_ptr,  # (K, C), (K, C), (N,), or None
    stats_ptr,  # (4, total)
    dx_ptr, g_ptr,  # (N, C, S), written, or None
    sums_ptr,  # (2, N, C), per-plane sums of g and g * x_hat, written, or None
    dweight_ptr, dbias_ptr,  # (K, C), written where SUMMED
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    samples, rows, channels, planes, sets, size, total,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    sample, channel, live = tile_planes(0, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN)
    s, mask = tile_elements(0, size, live, BLOCK_S, EVEN)
    offsets = at(sample, channel, s, stride_n, stride_c, stride_s)
    x = tl.load(
        x_ptr + at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s), mask=mask, other=0
    ).to(DTYPE)
    weight, bias = affine(
        weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
    )
    mean, error, rstd, var = load_statistics(stats_ptr, total, index, mine)
    start, rest = pivot(mean, error, rstd, var)
    x_hat = normalized(x, start, rest, rstd, mask)
    g = grad_tile(
        dy_ptr, x_hat, weight, bias, residual_ptr, offsets, mask, ACTIVATION, SLOPE, DTYPE, ""
    )
    if g_ptr is not None:
        tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
    g_sum = tl.sum(g, 2)
    gx_sum = tl.sum(g * x_hat, 2)
    if sums_ptr is not None:
        plane = sample * channels + channel
        tl.store(sums_ptr + plane, g_sum, mask=live)
        half = wide(samples) * channels
        tl.store(sums_ptr + half + plane, gx_sum, mask=live)
    if dx_ptr is not None:
        elements = tl.full([], 1.0, DTYPE) * planes * size
        weight = tl.where(live, weight, 0.0)
        a = tl.sum(weight * g_sum, 0) / elements
        b = tl.sum(weight * gx_sum, 0) / elements
        dx = g * weight[:, :, None] - a[None, :, None] - x_hat * b[None, :, None]
        dx = dx * rstd[None, :, None]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if SUMMED:  # the program has its channels of every sample: the table's columns are its own
        column = g0 + tl.arange(0, BLOCK_G)
        for row in range(0, rows):
            hit = live
            if labels_ptr is not None:
                label = tl.load(labels_ptr + sample, mask=sample < samples, other=-1)
                hit = live & (label == row)
            if dbias_ptr is not None:
                value = tl.sum(tl.where(hit, g_sum, 0.0), 0).to(dbias_ptr.dtype.element_ty)
                tl.store(dbias_ptr + row * channels + column, value, mask=mine)
            if dweight_ptr is not None:
                value = tl.sum(tl.where(hit, gx_sum, 0.0), 0).to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + row * channels + column, value, mask=mine)
