"""Statistics inside a sample: instance, group and layer norm. One program for each set."""

import triton
import triton.language as tl

from gannorm.kernels.tile import rsqrt, set_apply, set_grad, set_moments


@triton.jit
def instance_norm_fwd_kernel(
    x_ptr, stride_n, stride_c,  # (N, C, S), contiguous along S
    y_ptr, residual_ptr,  # (N, C, S), contiguous; residual may be None
    weight_ptr, bias_ptr,  # (K, C) or None
    labels_ptr,  # (N,) or None
    mean_ptr, var_ptr,  # (N, C / planes), written
    planes, size, rows, channels,  # channels of a group, S, K, C
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    EPS: tl.constexpr, GIVEN_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not GIVEN_STATS)
    group = tl.program_id(0).to(tl.int64)
    first = group * planes
    mean, error, var = set_moments(
        x_ptr, stride_n, stride_c, first, 1, planes, size, channels, BLOCK_P, BLOCK_S, DTYPE
    )
    tl.store(mean_ptr + group, mean)
    tl.store(var_ptr + group, var)
    set_apply(
        x_ptr, stride_n, stride_c, y_ptr, residual_ptr, weight_ptr, bias_ptr, labels_ptr,
        mean, error, rsqrt(var, EPS),
        first, 1, planes, size, rows, channels,
        ACTIVATION, SLOPE, RESIDUAL_AFTER, BLOCK_P, BLOCK_S, DTYPE,
    )  # fmt: skip


@triton.jit
def instance_norm_bwd_kernel(
    x_ptr, stride_n, stride_c,  # (N, C, S), contiguous along S
    dy_ptr, residual_ptr,  # (N, C, S), contiguous; residual may be None
    weight_ptr, bias_ptr,  # (K, C) or None
    labels_ptr,  # (N,) or None
    mean_ptr, var_ptr,  # (N, C / planes)
    dx_ptr, g_ptr,  # (N, C, S) or None, written
    g_sum_ptr, gx_sum_ptr,  # (N, C), written
    planes, size, rows, channels,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    EPS: tl.constexpr, GIVEN_STATS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + group)
    rstd = rsqrt(tl.load(var_ptr + group), EPS)
    set_grad(
        dy_ptr, x_ptr, stride_n, stride_c, residual_ptr, weight_ptr, bias_ptr, labels_ptr,
        mean, rstd, dx_ptr, g_ptr, g_sum_ptr, gx_sum_ptr,
        group * planes, 1, planes, size, rows, channels,
        ACTIVATION, SLOPE, GIVEN_STATS, BLOCK_P, BLOCK_S, DTYPE,
    )  # fmt: skip
