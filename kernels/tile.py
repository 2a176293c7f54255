"""What every norm kernel shares: tiles, moments, the affine, the epilogue and its derivative.

x is (N, C, S). A statistics set is a number of planes (n, c): batch norm's has channel c of every
sample, instance norm's one plane, group norm's the neighbouring channels of one sample. A tile is
(P, G, S): P planes of each of G neighbouring sets, S elements of each plane. Nothing below it
knows another difference between the norms (DOMAIN is "plane", "group" or "batch"), or between NCHW
and channels_last: those are strides.

Sums over a set end in float64, and the few numbers of a set are made from them in float64: the
statistics are then right to the last place of float32, and no magnitude overflows.
"""

import triton
import triton.language as tl


@triton.jit
def wide(number):
    """An integer argument as int64; where it equals 1 the JIT has made it a constant."""
    return tl.full([], 0, tl.int64) + number


@triton.jit
def program_sets(sets, DOMAIN: tl.constexpr, BLOCK_G: tl.constexpr):
    """The program's sample, its first set, the numbers of its sets among all, their mask (G,)."""
    blocks = (sets + BLOCK_G - 1) // BLOCK_G
    block = tl.program_id(0)
    sample = block * 0 if DOMAIN == "batch" else block // blocks
    g0 = (block - sample * blocks) * BLOCK_G
    g = g0 + tl.arange(0, BLOCK_G)
    return sample, g0, sample.to(tl.int64) * sets + g, g < sets


@triton.jit
def tile_planes(
    p0, g0, sample, planes, sets,
    DOMAIN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sample (P or 1, 1) and channel (P or 1, G) of a tile's planes, and their mask (P, G)."""
    p = (p0 + tl.arange(0, BLOCK_P))[:, None]
    of, channel, live = sets_planes(p, g0, sample, planes, sets, DOMAIN, BLOCK_G)
    if EVEN:
        live = tl.full([BLOCK_P, BLOCK_G], 1, tl.int1)
    return of, channel, live


@triton.jit
def sets_planes(p, g0, sample, planes, sets, DOMAIN: tl.constexpr, BLOCK_G: tl.constexpr):
    """The same of planes p (P, 1) of each set."""
    g = (g0 + tl.arange(0, BLOCK_G))[None, :]
    live = (p < planes) & (g < sets)
    if DOMAIN == "batch":
        of, channel = p.to(tl.int64), g.to(tl.int64)
    elif DOMAIN == "plane":
        of, channel = tl.full([1, 1], 0, tl.int64) + sample, g.to(tl.int64)
    else:
        of, channel = tl.full([1, 1], 0, tl.int64) + sample, g.to(tl.int64) * planes + p
    return of, channel, live


@triton.jit
def tile_elements(s0, size, live, BLOCK_S: tl.constexpr, EVEN: tl.constexpr):
    """Positions (1, 1, S) in the planes, and the elements' mask (P, G, S)."""
    s = (s0 + tl.arange(0, BLOCK_S))[None, None, :]
    if EVEN:
        return s, tl.full([live.shape[0], live.shape[1], BLOCK_S], 1, tl.int1)
    return s, live[:, :, None] & (s < size)


@triton.jit
def at(sample, channel, s, stride_n, stride_c, stride_s):
    """Offsets (P, G, S), past 2^31 where the tensor is."""
    return (sample * stride_n + channel * stride_c)[:, :, None] + s.to(tl.int64) * stride_s


@triton.jit
def set_total(v):
    """(P, G, S) summed to (G,) float64, the last steps of the sum in float64."""
    P: tl.constexpr = v.shape[0]
    G: tl.constexpr = v.shape[1]
    S: tl.constexpr = v.shape[2]
    if S % 4 == 0:
        v = tl.sum(tl.reshape(v, [P, G, S // 4, 4]), 3)
    return tl.sum(tl.sum(v.to(tl.float64), 2), 0)


@triton.jit
def first_elements(
    x_ptr, stride_n, stride_c, sample, g0, planes, sets,
    DOMAIN: tl.constexpr, BLOCK_G: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The first element of each set (G,), which its moments are taken relative to.

    A constant set then has exactly its value as mean, and variance 0.
    """
    g = g0 + tl.arange(0, BLOCK_G)
    channel = g.to(tl.int64) * planes if DOMAIN == "group" else g.to(tl.int64)
    offset = sample.to(tl.int64) * stride_n + channel * stride_c
    return tl.load(x_ptr + offset, mask=g < sets, other=0).to(DTYPE)


@triton.jit
def sum_of_squares(v):
    """(P, G, S) to (G,) float64: squares beyond float32 are taken at 2^-80."""
    total = set_total(v * v)
    huge = total == float("inf")
    if tl.max(huge.to(tl.int32), 0) > 0:
        small = v * 8.271806125530277e-25
        unscale = tl.full([], 1.461501637330903e48, tl.float64)  # 2^160
        total = tl.where(huge, set_total(small * small) * unscale, total)
    return total


@triton.jit
def reciprocal(planes, size):
    """1 / (planes * size) in float64, by Newton's method: a division would call a subroutine."""
    count = tl.full([], 1.0, tl.float64) * planes * size
    guess = (1.0 / count.to(tl.float32)).to(tl.float64)
    guess = guess * (2.0 - count * guess)
    return guess * (2.0 - count * guess)


@triton.jit
def statistics(first, offset, square, planes, size, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Mean, its rounding error, 1 / sqrt(variance + eps) and biased variance of sets (G,).

    offset: mean - first; square: sum of squares around the mean; both float64.
    """
    mean64 = first.to(tl.float64) + offset
    var64 = square * reciprocal(planes, size)
    rstd = tl.rsqrt(var64 + tl.full([], EPS, tl.float64)).to(DTYPE)
    mean = mean64.to(DTYPE)
    error = (mean64 - mean.to(tl.float64)).to(DTYPE)
    return mean, error, rstd, var64.to(DTYPE)


@triton.jit
def given_statistics(mean_ptr, var_ptr, index, live, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """The same four from a given mean and variance (C,)."""
    mean = tl.load(mean_ptr + index, mask=live, other=0).to(DTYPE)
    var = tl.load(var_ptr + index, mask=live, other=1).to(DTYPE)
    rstd = tl.rsqrt(var.to(tl.float64) + tl.full([], EPS, tl.float64)).to(DTYPE)
    return mean, mean * 0.0, rstd, var


@triton.jit
def store_statistics(stats_ptr, total, index, live, mean, error, rstd, var):
    """stats (4, total): mean, error, rstd, variance."""
    tl.store(stats_ptr + index, mean, mask=live)
    tl.store(stats_ptr + total + index, error, mask=live)
    tl.store(stats_ptr + 2 * total + index, rstd, mask=live)
    tl.store(stats_ptr + 3 * total + index, var, mask=live)


@triton.jit
def load_statistics(stats_ptr, total, index, live):
    mean = tl.load(stats_ptr + index, mask=live, other=0)
    error = tl.load(stats_ptr + total + index, mask=live, other=0)
    rstd = tl.load(stats_ptr + 2 * total + index, mask=live, other=1)
    return mean, error, rstd, tl.load(stats_ptr + 3 * total + index, mask=live, other=1)


@triton.jit
def stays_finite(value, ptr):
    """Whether `value` is finite in the dtype behind `ptr`.

    Not by its difference with itself: a product, contracted into the subtraction, leaves its
    rounding error there.
    """
    return tl.abs(value.to(ptr.dtype.element_ty)) < float("inf")


@triton.jit
def update_running(running_mean_ptr, running_var_ptr, index, live, mean, var, momentum, bessel):
    """Move the running statistics (C,) towards the batch's; non-finite ones never enter."""
    var = var * bessel
    if running_mean_ptr is not None:
        live = live & stays_finite(mean, running_mean_ptr)
    if running_var_ptr is not None:
        live = live & stays_finite(var, running_var_ptr)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + index, mask=live, other=0).to(mean.dtype)
        new = old + (mean - old) * momentum
        tl.store(running_mean_ptr + index, new.to(running_mean_ptr.dtype.element_ty), mask=live)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + index, mask=live, other=0).to(var.dtype)
        new = old + (var - old) * momentum
        tl.store(running_var_ptr + index, new.to(running_var_ptr.dtype.element_ty), mask=live)


@triton.jit
def pivot(mean, error, rstd, var):
    """What to subtract from x before scaling, and what is then left of the mean.

    Near 0 nothing: x * scale + shift rounds least. Far from 0 the mean, or its digits would be
    lost in the shift. A constant set is subtracted exactly to 0.
    """
    far = (tl.abs(mean) * rstd > 4.0) | (var == 0)
    return tl.where(far, mean, 0.0), tl.where(far, error, mean + error)


@triton.jit
def affine(
    weight_ptr, bias_ptr, labels_ptr, sample, channel, live, samples, rows, channels,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Weight and bias (P, G) of each plane's channel, in the row of its sample's label.

    A label outside the table gives NaN: to refuse it would be to wait for the device.
    """
    weight = tl.full(live.shape, 1.0, DTYPE)
    bias = tl.full(live.shape, 0.0, DTYPE)
    index = channel + sample * 0
    fits = live
    if labels_ptr is not None:
        label = tl.load(labels_ptr + sample, mask=sample < samples, other=0)
        index += label * channels
        fits = live & (label >= 0) & (label < rows)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + index, mask=fits, other=0).to(DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + index, mask=fits, other=0).to(DTYPE)
    if labels_ptr is not None:
        weight = tl.where(live & ~fits, float("nan"), weight)
    return weight, bias


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
def apply_tile(
    x, weight, bias, start, rest, rstd, y_ptr, residual_ptr, offsets, mask,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Store act((x - mean) * rstd * weight + bias (+ residual)) (+ residual).

    x (P, G, S) in DTYPE; weight, bias (P, G); start, rest (see `pivot`) and rstd (G,).
    """
    scale = rstd[None, :] * weight
    shift = bias - rest[None, :] * scale
    scale = tl.broadcast_to(scale[:, :, None], x.shape)
    y = tl.fma(x - start[None, :, None], scale, tl.broadcast_to(shift[:, :, None], x.shape))
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
def normalized(x, start, rest, rstd, mask):
    """x_hat (P, G, S), 0 where masked."""
    x = (x - start[None, :, None]) * rstd[None, :, None] - (rest * rstd)[None, :, None]
    return tl.where(mask, x, 0.0)


@triton.jit
def grad_tile(
    dy_ptr, x_hat, weight, bias, residual_ptr, offsets, mask,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DTYPE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """dy behind the activation (P, G, S); the activation's mask is recomputed, not stored.

    KEEP: whether a cache keeps what is read, `tl.load`'s eviction_policy.
    """
    g = tl.load(dy_ptr + offsets, mask=mask, other=0, eviction_policy=KEEP).to(DTYPE)
    if ACTIVATION is not None:
        z = x_hat * weight[:, :, None] + bias[:, :, None]
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0, eviction_policy=KEEP).to(DTYPE)
        g = _activate_grad(g, z, ACTIVATION, SLOPE)
    return g
