"""Statistics across the batch: batch and conditional batch norm. One program for each channel."""

import triton
import triton.language as tl

from gannorm.kernels.tile import rsqrt, set_apply, set_grad, set_moments


@triton.jit
def batch_norm_fwd_kernel(
    x_ptr, stride_n, stride_c,  # (N, C, S), contiguous along S
    y_ptr, residual_ptr,  # (N, C, S), contiguous; residual may be None
    weight_ptr, bias_ptr,  # (K, C) or None
    labels_ptr,  # (N,) or None
    mean_ptr, var_ptr,  # (C,): written, or read when GIVEN_STATS
    planes, size, rows, channels,  # N, S, K, C
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    EPS: tl.constexpr, GIVEN_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    if GIVEN_STATS:
        mean = tl.load(mean_ptr + channel).to(DTYPE)
        error = tl.full([], 0.0, DTYPE)
        var = tl.load(var_ptr + channel).to(DTYPE)
    else:
        mean, error, var = set_moments(
            x_ptr,
            stride_n,
            stride_c,
            channel,
            channels,
            planes,
            size,
            channels,
            BLOCK_P,
            BLOCK_S,
            DTYPE,
        )
        tl.store(mean_ptr + channel, mean)
        tl.store(var_ptr + channel, var)
    set_apply(
        x_ptr, stride_n, stride_c, y_ptr, residual_ptr, weight_ptr, bias_ptr, labels_ptr,
        mean, error, rsqrt(var, EPS),
        channel, channels, planes, size, rows, channels,
        ACTIVATION, SLOPE, RESIDUAL_AFTER, BLOCK_P, BLOCK_S, DTYPE,
    )  # fmt: skip


@triton.jit
def batch_norm_bwd_kernel(
    x_ptr, stride_n, stride_c,  # (N, C, S), contiguous along S
    dy_ptr, residual_ptr,  # (N, C, S), contiguous; residual may be None
    weight_ptr, bias_ptr,  # (K, C) or None
    labels_ptr,  # (N,) or None
    mean_ptr, var_ptr,  # (C,)
    dx_ptr, g_ptr,  # (N, C, S) or None, written
    g_sum_ptr, gx_sum_ptr,  # (N, C), written
    planes, size, rows, channels,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    EPS: tl.constexpr, GIVEN_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + channel).to(DTYPE)
    rstd = rsqrt(tl.load(var_ptr + channel).to(DTYPE), EPS)
    set_grad(
        dy_ptr, x_ptr, stride_n, stride_c, residual_ptr, weight_ptr, bias_ptr, labels_ptr,
        mean, rstd, dx_ptr, g_ptr, g_sum_ptr, gx_sum_ptr,
        channel, channels, planes, size, rows, channels,
        ACTIVATION, SLOPE, GIVEN_STATS, BLOCK_P, BLOCK_S, DTYPE,
    )  # fmt: skip
