"""Statistics sets larger than one program's registers: partial sums, then apply.

A set is cut into chunks: whole planes where a plane fits into a tile, else parts of one plane.
Every chunk writes its partial sums, and the second kernel merges a set's partials in a fixed order,
chunk by chunk again: the same bits on every run. Where the partials are many a small kernel merges
them in between, once. With given statistics only the last kernel is needed.
"""

import triton
import triton.language as tl

from gannorm.kernels.tile import (
    affine,
    apply_tile,
    at,
    first_elements,
    given_statistics,
    grad_tile,
    load_statistics,
    normalized,
    pivot,
    program_sets,
    reciprocal,
    set_total,
    sets_planes,
    statistics,
    store_statistics,
    tile_elements,
    tile_planes,
    update_running,
    wide,
)

MERGE: tl.constexpr = tl.constexpr(1024)  # partials, of all sets, merged at a time


@triton.jit
def _chunk(
    chunk, planes, size, loops,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_S: tl.constexpr,
):  # fmt: skip
    """Planes p0 .. p1 and elements s0 .. s1 of chunks, and which part of its planes each is."""
    if SPLIT_S:
        step = loops * BLOCK_S
        parts = (size + step - 1) // step
        part = chunk % parts
        p0 = chunk // parts * BLOCK_P
        p1 = tl.minimum(p0 + BLOCK_P, planes)
        s0, s1 = part * step, tl.minimum(part * step + step, size)
    else:
        step = loops * BLOCK_P
        part = chunk * 0
        p0, p1 = chunk * step, tl.minimum(chunk * step + step, planes)
        s0, s1 = part, part + size
    return p0, p1, s0, s1, part


@triton.jit
def _chunk_moments(
    x_ptr, stride_n, stride_c, stride_s, first, scale,
    n, g0, p0, p1, s0, s1, planes, sets, size,
    DOMAIN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares around it (G,) float64 of (x - first) * scale over a chunk.

    Welford's update in every lane of the tile, so that the loop has no reduction; Chan's merge of
    the lanes at the end.
    """
    mean = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
    square = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
    turn = tl.full([], 0.0, DTYPE)
    for p in range(p0, p1, BLOCK_P):
        for s_start in range(s0, s1, BLOCK_S):
            sample, channel, live = tile_planes(
                p, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN
            )
            s, mask = tile_elements(s_start, size, live, BLOCK_S, EVEN)
            offsets = at(sample, channel, s, stride_n, stride_c, stride_s)
            x = tl.load(x_ptr + offsets, mask=mask, other=0).to(DTYPE)
            turn += 1.0
            delta = tl.where(mask, (x - first[None, :, None]) * scale - mean, 0.0)
            mean += delta * (1.0 / turn)
            square += tl.where(mask, delta * ((x - first[None, :, None]) * scale - mean), 0.0)
    # How many elements each lane has met: a lane ends early at the set's border only.
    lane_p = (p1 - p0 - tl.arange(0, BLOCK_P) + BLOCK_P - 1) // BLOCK_P
    lane_s = (s1 - s0 - tl.arange(0, BLOCK_S) + BLOCK_S - 1) // BLOCK_S
    counts = (lane_p[:, None, None] * lane_s[None, None, :]).to(DTYPE) + mean * 0
    centre = set_total(mean * counts) * reciprocal(p1 - p0, s1 - s0)
    apart = mean - centre.to(DTYPE)[None, :, None]
    return centre, set_total(tl.where(counts > 0, square + counts * (apart * apart), 0.0))


@triton.jit
def split_moments_kernel(
    x_ptr,  # (N, C, S)
    partial_ptr,  # (2, chunks, total) float64, written: mean - first, sum of squares
    stride_n, stride_c, stride_s, planes, sets, size, total, chunks, loops,
    DOMAIN: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    SPLIT_S: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    chunk = tl.program_id(1)
    p0, p1, s0, s1, _ = _chunk(chunk, planes, size, loops, BLOCK_P, BLOCK_S, SPLIT_S)
    first = first_elements(x_ptr, stride_n, stride_c, n, g0, planes, sets, DOMAIN, BLOCK_G, DTYPE)
    mean, square = _chunk_moments(
        x_ptr, stride_n, stride_c, stride_s, first, 1.0,
        n, g0, p0, p1, s0, s1, planes, sets, size,
        DOMAIN, DTYPE, BLOCK_P, BLOCK_G, BLOCK_S, EVEN,
    )  # fmt: skip
    huge = square == float("inf")
    if tl.max(huge.to(tl.int32), 0) > 0:  # squares beyond float32: again, at 2^-80
        small_mean, small_square = _chunk_moments(
            x_ptr, stride_n, stride_c, stride_s, first, 8.271806125530277e-25,
            n, g0, p0, p1, s0, s1, planes, sets, size,
            DOMAIN, DTYPE, BLOCK_P, BLOCK_G, BLOCK_S, EVEN,
        )  # fmt: skip
        unscale = tl.full([], 1.2089258196146292e24, tl.float64)  # 2^80
        mean = tl.where(huge, small_mean * unscale, mean)
        square = tl.where(huge, small_square * unscale * unscale, square)
    to = chunk.to(tl.int64) * total + index
    tl.store(partial_ptr + to, mean, mask=mine)
    tl.store(partial_ptr + wide(chunks) * total + to, square, mask=mine)


@triton.jit
def merge_moments(
    partial_ptr, index, live, planes, size, total, chunks, loops,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_S: tl.constexpr,
):  # fmt: skip
    """All chunks' moments of sets (G,): mean - first, and sum of squares, float64."""
    BLOCK: tl.constexpr = MERGE // BLOCK_G
    part_of_set = reciprocal(planes, size)
    offset = tl.zeros([BLOCK_G], tl.float64)
    square = tl.zeros([BLOCK_G], tl.float64)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        p0, p1, s0, s1, _ = _chunk(chunk, planes, size, loops, BLOCK_P, BLOCK_S, SPLIT_S)
        share = ((p1 - p0).to(tl.float64) * (s1 - s0).to(tl.float64))[:, None]
        at_ = partial_ptr + chunk.to(tl.int64)[:, None] * total + index[None, :]
        mask = (chunk < chunks)[:, None] & live[None, :]
        mean = tl.load(at_, mask=mask, other=0)
        offset += tl.sum(tl.where(mask, mean * share, 0.0), 0) * part_of_set
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        p0, p1, s0, s1, _ = _chunk(chunk, planes, size, loops, BLOCK_P, BLOCK_S, SPLIT_S)
        share = ((p1 - p0).to(tl.float64) * (s1 - s0).to(tl.float64))[:, None]
        at_ = partial_ptr + chunk.to(tl.int64)[:, None] * total + index[None, :]
        mask = (chunk < chunks)[:, None] & live[None, :]
        apart = tl.load(at_, mask=mask, other=0) - offset[None, :]
        inner = tl.load(at_ + wide(chunks) * total, mask=mask, other=0)
        square += tl.sum(tl.where(mask, inner + share * apart * apart, 0.0), 0)
    return offset, square


@triton.jit
def split_merge_kernel(
    x_ptr,  # (N, C, S)
    partial_ptr,  # (2, chunks, total)
    stats_ptr,  # (4, total), written
    running_mean_ptr, running_var_ptr,  # (C,), moved, or None
    momentum, bessel,
    stride_n, stride_c, planes, sets, size, total, chunks, loops,
    DOMAIN: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_S: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    first = first_elements(x_ptr, stride_n, stride_c, n, g0, planes, sets, DOMAIN, BLOCK_G, DTYPE)
    offset, square = merge_moments(
        partial_ptr, index, mine, planes, size, total, chunks, loops,
        BLOCK_P, BLOCK_G, BLOCK_S, SPLIT_S,
    )  # fmt: skip
    mean, error, rstd, var = statistics(first, offset, square, planes, size, EPS, DTYPE)
    store_statistics(stats_ptr, total, index, mine, mean, error, rstd, var)
    if running_mean_ptr is not None or running_var_ptr is not None:
        update_running(running_mean_ptr, running_var_ptr, index, mine, mean, var, momentum, bessel)


@triton.jit
def split_apply_kernel(
    x_ptr, y_ptr, residual_ptr,  # (N, C, S); residual may be None
    weight_ptr, bias_ptr, labels_ptr,  # (K, C), (K, C), (N,), or None
    partial_ptr,  # (2, chunks, total); None with given or merged statistics
    mean_ptr, var_ptr,  # given statistics (C,), or None
    stats_ptr,  # (4, total), written; read where merged
    running_mean_ptr, running_var_ptr,  # (C,), moved, or None
    momentum, bessel,
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    samples, rows, channels, planes, sets, size, total, chunks, loops,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    SPLIT_S: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    chunk = tl.program_id(1)
    if mean_ptr is not None:
        mean, error, rstd, var = given_statistics(mean_ptr, var_ptr, index, mine, EPS, DTYPE)
    elif partial_ptr is None:
        mean, error, rstd, var = load_statistics(stats_ptr, total, index, mine)
    else:
        first = first_elements(
            x_ptr, x_stride_n, x_stride_c, n, g0, planes, sets, DOMAIN, BLOCK_G, DTYPE
        )
        offset, square = merge_moments(
            partial_ptr, index, mine, planes, size, total, chunks, loops,
            BLOCK_P, BLOCK_G, BLOCK_S, SPLIT_S,
        )  # fmt: skip
        mean, error, rstd, var = statistics(first, offset, square, planes, size, EPS, DTYPE)
    if chunk == 0 and (mean_ptr is not None or partial_ptr is not None):
        store_statistics(stats_ptr, total, index, mine, mean, error, rstd, var)
        if running_mean_ptr is not None or running_var_ptr is not None:
            update_running(
                running_mean_ptr, running_var_ptr, index, mine, mean, var, momentum, bessel
            )
    start, rest = pivot(mean, error, rstd, var)
    p0, p1, s0, s1, _ = _chunk(chunk, planes, size, loops, BLOCK_P, BLOCK_S, SPLIT_S)
    for p in range(p0, p1, BLOCK_P):
        sample, channel, live = tile_planes(p, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN)
        weight, bias = affine(
            weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
        )
        for s_start in range(s0, s1, BLOCK_S):
            s, mask = tile_elements(s_start, size, live, BLOCK_S, EVEN)
            offsets = at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s)
            x = tl.load(x_ptr + offsets, mask=mask, other=0).to(DTYPE)
            apply_tile(
                x, weight, bias, start, rest, rstd, y_ptr, residual_ptr,
                at(sample, channel, s, stride_n, stride_c, stride_s), mask,
                ACTIVATION, SLOPE, RESIDUAL_AFTER, DTYPE,
            )  # fmt: skip


@triton.jit
def split_sums_kernel(
    x_ptr, dy_ptr, residual_ptr,  # (N, C, S); residual may be None
    weight_ptr, bias_ptr, labels_ptr,  # (K, C), (K, C), (N,), or None
    stats_ptr,  # (4, total)
    sums_ptr,  # (2, parts, N, C), written: sums of g and g * x_hat over each part of a plane
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    samples, rows, channels, planes, sets, size, total, parts, loops,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    SPLIT_S: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    mean, error, rstd, var = load_statistics(stats_ptr, total, index, mine)
    start, rest = pivot(mean, error, rstd, var)
    p0, p1, s0, s1, part = _chunk(tl.program_id(1), planes, size, loops, BLOCK_P, BLOCK_S, SPLIT_S)
    half = wide(samples) * channels
    for p in range(p0, p1, BLOCK_P):
        sample, channel, live = tile_planes(p, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN)
        weight, bias = affine(
            weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
        )
        g_sum = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
        gx_sum = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_S], DTYPE)
        for s_start in range(s0, s1, BLOCK_S):
            s, mask = tile_elements(s_start, size, live, BLOCK_S, EVEN)
            offsets = at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s)
            x = tl.load(x_ptr + offsets, mask=mask, other=0).to(DTYPE)
            x_hat = normalized(x, start, rest, rstd, mask)
            g = grad_tile(
                dy_ptr, x_hat, weight, bias, residual_ptr,
                at(sample, channel, s, stride_n, stride_c, stride_s), mask,
                ACTIVATION, SLOPE, DTYPE, "",
            )  # fmt: skip
            g_sum += g
            gx_sum += g * x_hat
        to = part * half + sample * channels + channel
        tl.store(sums_ptr + to, tl.sum(g_sum, 2), mask=live)
        tl.store(sums_ptr + parts * half + to, tl.sum(gx_sum, 2), mask=live)


@triton.jit
def mean_grads(
    sums_ptr, weight_ptr, labels_ptr, n, g0, samples, rows, channels, planes, sets, size, parts,
    DOMAIN: tl.constexpr, BLOCK_G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Means of weight * g and weight * g * x_hat over sets (G,), in a fixed order."""
    BLOCK: tl.constexpr = MERGE // BLOCK_G
    a = tl.zeros([BLOCK_G], DTYPE)
    b = tl.zeros([BLOCK_G], DTYPE)
    half = wide(samples) * channels
    for start in range(0, parts * planes, BLOCK):
        number = (start + tl.arange(0, BLOCK))[:, None]
        part = number // planes
        plane = tl.where(part < parts, number - part * planes, planes)
        sample, channel, live = sets_planes(plane, g0, n, planes, sets, DOMAIN, BLOCK_G)
        weight, _ = affine(
            weight_ptr, None, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
        )
        weight = tl.where(live, weight, 0.0)
        of = sums_ptr + part * half + sample * channels + channel
        a += tl.sum(weight * tl.load(of, mask=live, other=0), 0)
        b += tl.sum(weight * tl.load(of + parts * half, mask=live, other=0), 0)
    elements = tl.full([], 1.0, DTYPE) * planes * size
    return a / elements, b / elements


@triton.jit
def split_reduce_kernel(
    sums_ptr,  # (2, parts, N, C)
    weight_ptr, labels_ptr,  # (K, C), (N,), or None
    means_ptr,  # (2, total), written: means over the sets of weight * g, weight * g * x_hat
    samples, rows, channels, planes, sets, size, total, parts,
    DOMAIN: tl.constexpr, BLOCK_G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    a, b = mean_grads(
        sums_ptr, weight_ptr, labels_ptr, n, g0, samples, rows, channels, planes, sets, size,
        parts, DOMAIN, BLOCK_G, DTYPE,
    )  # fmt: skip
    tl.store(means_ptr + index, a, mask=mine)
    tl.store(means_ptr + total + index, b, mask=mine)


@triton.jit
def split_dx_kernel(
    x_ptr, dy_ptr, residual_ptr,  # (N, C, S); residual may be None
    weight_ptr, bias_ptr, labels_ptr,  # (K, C), (K, C), (N,), or None
    stats_ptr,  # (4, total)
    sums_ptr,  # (2, parts, N, C), or
    means_ptr,  # (2, total); None, both, with given statistics
    dx_ptr, g_ptr,  # (N, C, S), written, or None
    x_stride_n, x_stride_c, x_stride_s, stride_n, stride_c, stride_s,
    samples, rows, channels, planes, sets, size, total, parts, loops,
    DOMAIN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    SPLIT_S: tl.constexpr,
):  # fmt: skip
    n, g0, index, mine = program_sets(sets, DOMAIN, BLOCK_G)
    mean, error, rstd, var = load_statistics(stats_ptr, total, index, mine)
    start, rest = pivot(mean, error, rstd, var)
    if means_ptr is not None:
        a = tl.load(means_ptr + index, mask=mine, other=0)
        b = tl.load(means_ptr + total + index, mask=mine, other=0)
    elif sums_ptr is not None:
        a, b = mean_grads(
            sums_ptr, weight_ptr, labels_ptr, n, g0, samples, rows, channels, planes, sets, size,
            parts, DOMAIN, BLOCK_G, DTYPE,
        )  # fmt: skip
    else:
        a = tl.zeros([BLOCK_G], DTYPE)
        b = tl.zeros([BLOCK_G], DTYPE)
    p0, p1, s0, s1, _ = _chunk(tl.program_id(1), planes, size, loops, BLOCK_P, BLOCK_S, SPLIT_S)
    for p in range(p0, p1, BLOCK_P):
        sample, channel, live = tile_planes(p, g0, n, planes, sets, DOMAIN, BLOCK_P, BLOCK_G, EVEN)
        weight, bias = affine(
            weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels, DTYPE
        )
        for s_start in range(s0, s1, BLOCK_S):
            s, mask = tile_elements(s_start, size, live, BLOCK_S, EVEN)
            offsets = at(sample, channel, s, x_stride_n, x_stride_c, x_stride_s)
            x = tl.load(x_ptr + offsets, mask=mask, other=0).to(DTYPE)
            x_hat = normalized(x, start, rest, rstd, mask)
            offsets = at(sample, channel, s, stride_n, stride_c, stride_s)
            g = grad_tile(
                dy_ptr,
                x_hat,
                weight,
                bias,
                residual_ptr,
                offsets,
                mask,
                ACTIVATION,
                SLOPE,
                DTYPE,
                "",
            )
            if g_ptr is not None:
                tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None:
                dx = g * weight[:, :, None] - a[None, :, None] - x_hat * b[None, :, None]
                dx = dx * rstd[None, :, None]
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def table_grad_kernel(
    sums_ptr,  # (2, parts, N, C)
    labels_ptr,  # (N,), or None: every sample belongs to row 0
    dweight_ptr, dbias_ptr,  # (K, C), written, or None
    samples, channels, parts,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per-plane sums added up per row of the table, in a fixed order: no atomics.

    A tile has BLOCK sums of each channel: BLOCK_N samples, and many parts where these are few.
    """
    row = tl.program_id(0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    g_sum = tl.zeros([BLOCK_C], DTYPE)
    gx_sum = tl.zeros([BLOCK_C], DTYPE)
    half = wide(samples) * channels
    lane = tl.arange(0, BLOCK)[:, None]
    for start in range(0, samples, BLOCK_N):
        n = start + lane % BLOCK_N
        hit = n < samples
        if labels_ptr is not None:
            hit = tl.load(labels_ptr + n, mask=hit, other=-1) == row
        for first in range(0, parts, BLOCK // BLOCK_N):
            part = first + lane // BLOCK_N
            mask = hit & (part < parts) & (c < channels)
            of = sums_ptr + part * half + n.to(tl.int64) * channels + c
            if dbias_ptr is not None:
                g_sum += tl.sum(tl.load(of, mask=mask, other=0), 0)
            if dweight_ptr is not None:
                gx_sum += tl.sum(tl.load(of + parts * half, mask=mask, other=0), 0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    to = row.to(tl.int64) * channels + column
    if dbias_ptr is not None:
        tl.store(dbias_ptr + to, g_sum.to(dbias_ptr.dtype.element_ty), mask=column < channels)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + to, gx_sum.to(dweight_ptr.dtype.element_ty), mask=column < channels)
