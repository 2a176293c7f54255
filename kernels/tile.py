"""What every norm kernel shares: tiles of planes, Chan's merge, the epilogue and its derivative.

A statistics set is a number of planes, the plane (n, c) standing at (n * C + c) * S elements:
`planes` of them from plane `first`, `step` apart. Instance norm: one plane; group norm: the
group's neighbours (step 1); batch norm: a channel's plane in every sample (step C). The loops
below run over tiles of BLOCK_P planes by BLOCK_S elements and know no other difference. Only the
input x may lie elsewhere, its planes stride_n and stride_c apart.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(p0, s0, first, step, planes, size, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):
    """Plane numbers n * C + c (BLOCK_P,), contiguous offsets and mask (BLOCK_P, BLOCK_S)."""
    p = p0 + tl.arange(0, BLOCK_P)
    s = s0 + tl.arange(0, BLOCK_S)
    plane = first + p.to(tl.int64) * step
    live = p < planes
    mask = live[:, None] & (s < size)[None, :]
    return plane, live, plane[:, None] * size + s[None, :], mask


@triton.jit
def _load_x(x_ptr, stride_n, stride_c, plane, s0, mask, channels, BLOCK_S: tl.constexpr):
    """x (N, C, S), its planes contiguous and anywhere: a slice is read where it lies."""
    start = plane // channels * stride_n + plane % channels * stride_c
    s = s0 + tl.arange(0, BLOCK_S)
    return tl.load(x_ptr + start[:, None] + s[None, :], mask=mask, other=0)


@triton.jit
def _affine(weight_ptr, bias_ptr, labels_ptr, plane, live, rows, channels, DTYPE: tl.constexpr):
    """Weight and bias (BLOCK_P, 1) of each plane's channel, in the row of its sample's label.

    A label outside the table gives NaN: to refuse it would be to wait for the device.
    """
    index = plane % channels
    weight = tl.full(plane.shape, 1.0, DTYPE)
    bias = tl.full(plane.shape, 0.0, DTYPE)
    fits = live
    if labels_ptr is not None:
        label = tl.load(labels_ptr + plane // channels, mask=live, other=0)
        fits = (label >= 0) & (label < rows)
        index += label * channels
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index, mask=live & fits, other=0).to(DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + index, mask=live & fits, other=0).to(DTYPE)
    if labels_ptr is not None:
        weight = tl.where(fits, weight, float("nan"))
    return weight[:, None], bias[:, None]


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    # Written with z < 0 so that NaN passes through.
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    if ACTIVATION == "leaky_relu":
        z = tl.where(z < 0, z * tl.full([], SLOPE, z.dtype), z)
    if ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _activate_grad(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """dy times the activation's derivative at z."""
    if ACTIVATION == "relu":
        dy = tl.where(z <= 0, 0.0, dy)
    if ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * tl.full([], SLOPE, z.dtype))
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit
def rsqrt(var, EPS: tl.constexpr):
    """1 / sqrt(var + eps), eps in var's precision."""
    return 1.0 / tl.sqrt(var + tl.full([], EPS, var.dtype))


@triton.jit
def set_moments(
    x_ptr, stride_n, stride_c, first, step, planes, size, channels,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Mean, the mean's rounding error, and biased variance of a set.

    Two-pass in each tile, tiles merged by Chan's formula, all relative to the first element: a
    constant set has exactly its value as mean, and variance 0. The true mean is mean + error
    (Knuth's TwoSum): far from 0 the error is all that a rounded mean gets wrong.
    """
    corner = first // channels * stride_n + first % channels * stride_c
    first_x = tl.load(x_ptr + corner).to(DTYPE)
    count = tl.full([], 0.0, DTYPE)
    offset = tl.full([], 0.0, DTYPE)
    square = tl.full([], 0.0, DTYPE)
    for p0 in range(0, planes, BLOCK_P):
        for s0 in range(0, size, BLOCK_S):
            plane, _, _, mask = _tile(p0, s0, first, step, planes, size, BLOCK_P, BLOCK_S)
            x = _load_x(x_ptr, stride_n, stride_c, plane, s0, mask, channels, BLOCK_S).to(DTYPE)
            x = tl.where(mask, x - first_x, 0.0)
            tile_count = tl.sum(tl.sum(mask.to(DTYPE), 1), 0)
            tile_mean = tl.sum(tl.sum(x, 1), 0) / tile_count
            centred = tl.where(mask, x - tile_mean, 0.0)
            tile_square = tl.sum(tl.sum(centred * centred, 1), 0)
            total = count + tile_count
            delta = tile_mean - offset
            offset += delta * (tile_count / total)
            square += tile_square + delta * delta * (count * tile_count / total)
            count = total
    mean = first_x + offset
    part = mean - first_x
    error = (first_x - (mean - part)) + (offset - part)
    return mean, error, square / count


@triton.jit
def set_apply(
    x_ptr, stride_n, stride_c, y_ptr, residual_ptr, weight_ptr, bias_ptr, labels_ptr,
    mean, error, rstd,
    first, step, planes, size, rows, channels,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """act((x - mean - error) * (rstd * weight) + bias (+ residual)) (+ residual) over a set."""
    for p0 in range(0, planes, BLOCK_P):
        for s0 in range(0, size, BLOCK_S):
            plane, live, offsets, mask = _tile(p0, s0, first, step, planes, size, BLOCK_P, BLOCK_S)
            weight, bias = _affine(
                weight_ptr, bias_ptr, labels_ptr, plane, live, rows, channels, DTYPE
            )
            x = _load_x(x_ptr, stride_n, stride_c, plane, s0, mask, channels, BLOCK_S).to(DTYPE)
            y = ((x - mean) - error) * (rstd * weight) + bias
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + offsets, mask=mask, other=0).to(DTYPE)
                if RESIDUAL_AFTER:
                    y = _activate(y, ACTIVATION, SLOPE) + residual
                else:
                    y = _activate(y + residual, ACTIVATION, SLOPE)
            else:
                y = _activate(y, ACTIVATION, SLOPE)
            tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_tile(
    dy_ptr, x, residual_ptr, offsets, mask, weight, bias, mean, rstd,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dy behind the activation, and x_hat; the mask is recomputed, not stored."""
    g = tl.load(dy_ptr + offsets, mask=mask, other=0).to(DTYPE)
    x_hat = tl.where(mask, (x - mean) * rstd, 0.0)
    if ACTIVATION is not None:
        z = x_hat * weight + bias
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0).to(DTYPE)
        g = _activate_grad(g, z, ACTIVATION, SLOPE)
    return g, x_hat


@triton.jit
def set_grad(
    dy_ptr, x_ptr, stride_n, stride_c, residual_ptr, weight_ptr, bias_ptr, labels_ptr, mean, rstd,
    dx_ptr, g_ptr, g_sum_ptr, gx_sum_ptr,
    first, step, planes, size, rows, channels,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, GIVEN_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dx, g (the gradient of an inner residual) and the per-plane sums of g and g * x_hat.

    dx = rstd * (weight * g - mean(weight * g) - x_hat * mean(weight * g * x_hat)), the means over
    the set; with given statistics only the first term.
    """
    a = tl.full([], 0.0, DTYPE)
    b = tl.full([], 0.0, DTYPE)
    for p0 in range(0, planes, BLOCK_P):
        g_sum = tl.zeros([BLOCK_P], DTYPE)
        gx_sum = tl.zeros([BLOCK_P], DTYPE)
        for s0 in range(0, size, BLOCK_S):
            plane, live, offsets, mask = _tile(p0, s0, first, step, planes, size, BLOCK_P, BLOCK_S)
            weight, bias = _affine(
                weight_ptr, bias_ptr, labels_ptr, plane, live, rows, channels, DTYPE
            )
            x = _load_x(x_ptr, stride_n, stride_c, plane, s0, mask, channels, BLOCK_S).to(DTYPE)
            g, x_hat = _grad_tile(
                dy_ptr, x, residual_ptr, offsets, mask, weight, bias, mean, rstd,
                ACTIVATION, SLOPE, DTYPE,
            )  # fmt: skip
            g_sum += tl.sum(g, 1)
            gx_sum += tl.sum(g * x_hat, 1)
        plane, live, offsets, mask = _tile(p0, 0, first, step, planes, size, BLOCK_P, BLOCK_S)
        weight, bias = _affine(weight_ptr, bias_ptr, labels_ptr, plane, live, rows, channels, DTYPE)
        tl.store(g_sum_ptr + plane, g_sum, mask=live)
        tl.store(gx_sum_ptr + plane, gx_sum, mask=live)
        a += tl.sum(g_sum * tl.sum(weight, 1), 0)
        b += tl.sum(gx_sum * tl.sum(weight, 1), 0)
    elements = tl.full([], 1.0, DTYPE) * planes * size
    for p0 in range(0, planes, BLOCK_P):
        for s0 in range(0, size, BLOCK_S):
            plane, live, offsets, mask = _tile(p0, s0, first, step, planes, size, BLOCK_P, BLOCK_S)
            weight, bias = _affine(
                weight_ptr, bias_ptr, labels_ptr, plane, live, rows, channels, DTYPE
            )
            x = _load_x(x_ptr, stride_n, stride_c, plane, s0, mask, channels, BLOCK_S).to(DTYPE)
            g, x_hat = _grad_tile(
                dy_ptr, x, residual_ptr, offsets, mask, weight, bias, mean, rstd,
                ACTIVATION, SLOPE, DTYPE,
            )  # fmt: skip
            if g_ptr is not None:
                tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None:
                dx = g * weight
                if not GIVEN_STATS:
                    dx = dx - a / elements - x_hat * (b / elements)
                tl.store(dx_ptr + offsets, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def table_grad_kernel(
    sums_ptr,  # (N, C)
    labels_ptr,  # (N,), or None: every sample belongs to row 0
    grad_ptr,  # (K, C)
    samples, channels,
    BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Per-sample sums added up per row of the table, sample after sample: no atomics."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < channels
    total = tl.zeros([BLOCK_C], DTYPE)
    for n in range(0, samples):
        value = tl.load(sums_ptr + n * channels + c, mask=live, other=0)
        if labels_ptr is not None:
            value = tl.where(tl.load(labels_ptr + n) == row, value, 0.0)
        total += value
    index = row.to(tl.int64) * channels + c
    tl.store(grad_ptr + index, total.to(grad_ptr.dtype.element_ty), mask=live)
