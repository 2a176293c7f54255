"""The launchers: outputs allocated, a plan chosen, one kernel each way (two with an affine).

`forward` and `backward` take tensors on one device, contiguous but for x, whose planes may lie
anywhere; `gannorm.functional` has checked them. `spec` is any object with groups, eps,
activation, negative_slope and residual_after_activation (`gannorm.reference.NormSpec`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gannorm.kernels.batch_norm import batch_norm_bwd_kernel, batch_norm_fwd_kernel
from gannorm.kernels.instance_norm import instance_norm_bwd_kernel, instance_norm_fwd_kernel
from gannorm.kernels.tile import table_grad_kernel

TILE = 16384  # bytes, in the dtype of the statistics, that a program handles at a time
TABLE_BLOCK = 256  # channels, in one warp: 16-byte loads


def plan(planes: int, size: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Tile and warps for sets of `planes` planes of `size` elements of `dtype`.

    At most 16 elements a thread (fp64: 8): more spill. At least 8 where a tile of 1024 has them,
    which are 16 bytes of bf16 for the 64 lanes of an AMD warp too.
    """
    itemsize = 8 if dtype == torch.float64 else 4
    block_s = min(triton.next_power_of_2(size), TILE // itemsize)
    block_p = min(triton.next_power_of_2(planes), TILE // itemsize // block_s)
    warps = max(1, min(8, block_p * block_s * itemsize // 2048))
    return {"BLOCK_P": block_p, "BLOCK_S": block_s, "num_warps": warps}


def _sets(x: Tensor, groups: int) -> tuple[int, int, tuple[int, ...]]:
    """How many statistics sets, planes in each, and the shape of the statistics."""
    n, c, _ = x.shape
    return (n * groups, c // groups, (n, groups)) if groups else (c, n, (c,))


def _constants(x: Tensor, spec: Any, given_stats: bool) -> dict[str, Any]:
    return {
        "ACTIVATION": spec.activation,
        "SLOPE": spec.negative_slope,
        "EPS": spec.eps,
        "GIVEN_STATS": given_stats,
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }


def _rows(weight: Tensor | None, bias: Tensor | None) -> int:
    table = bias if weight is None else weight
    return 1 if table is None else table.shape[0]


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,  # (N,)
    residual: Tensor | None,  # (N, C, S)
    mean: Tensor | None,  # given statistics (C,): evaluation mode
    var: Tensor | None,
    spec: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and biased variance that were used: (C,) or (N, groups)."""
    given = mean is not None and var is not None
    programs, planes, shape = _sets(x, spec.groups)
    if mean is None or var is None:
        mean = x.new_zeros(shape, dtype=_stat_dtype(x))
        var = torch.zeros_like(mean)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        kernel = instance_norm_fwd_kernel if spec.groups else batch_norm_fwd_kernel
        kernel[(programs,)](
            x, x.stride(0), x.stride(1), y, residual, weight, bias, labels, mean, var,
            planes, x.shape[2], _rows(weight, bias), x.shape[1],
            RESIDUAL_AFTER=spec.residual_after_activation,
            **_constants(x, spec, given), **plan(planes, x.shape[2], x.dtype),
        )  # fmt: skip
    return y, mean, var


def backward(
    dy: Tensor,  # (N, C, S)
    x: Tensor,
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # only where the activation's derivative depends on it
    mean: Tensor,
    var: Tensor,
    spec: Any,
    given_stats: bool,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, and the gradient of `residual`."""
    programs, planes, _ = _sets(x, spec.groups)
    n, c, size = x.shape
    dx = torch.empty_like(dy, dtype=x.dtype) if need_dx else None
    g = torch.empty_like(dy, dtype=x.dtype) if residual is not None else None
    sums = x.new_zeros((2, n, c), dtype=_stat_dtype(x))
    if x.numel():
        kernel = instance_norm_bwd_kernel if spec.groups else batch_norm_bwd_kernel
        kernel[(programs,)](
            x, x.stride(0), x.stride(1), dy, residual, weight, bias, labels, mean, var,
            dx, g, sums[0], sums[1],
            planes, size, _rows(weight, bias), c,
            **_constants(x, spec, given_stats), **plan(planes, size, x.dtype),
        )  # fmt: skip
    return dx, _table_grad(sums[1], weight, labels), _table_grad(sums[0], bias, labels), g


def _table_grad(sums: Tensor, table: Tensor | None, labels: Tensor | None) -> Tensor | None:
    if table is None:
        return None
    grad = torch.empty_like(table)
    rows, channels = table.shape
    if channels:
        table_grad_kernel[(rows, triton.cdiv(channels, TABLE_BLOCK))](
            sums, labels, grad, sums.shape[0], channels,
            BLOCK_C=TABLE_BLOCK, DTYPE=tl.float64 if sums.dtype == torch.float64 else tl.float32,
            num_warps=1,
        )  # fmt: skip
    return grad
