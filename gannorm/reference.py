"""Every norm in plain torch: the path for machines without a GPU, and the oracle for the kernels.

`forward` and `backward` have the launchers' signatures (see `gannorm.kernels`), so that the
autograd Function calls either without knowing which. Under `torch.no_grad` `forward` works in
place on its own temporaries; with grad enabled it is a composition of differentiable torch ops,
which is where second and higher derivatives come from (`gannorm.autograd`).

The variance is two-pass around a mean that is itself shifted by the first element of each set:
a constant plane of any magnitude then normalizes to exactly 0. Tried and dropped: `torch.var_mean`
(Welford) is 5 to 8 times slower on a CPU; E[x^2] - E[x]^2 cancels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class NormSpec(NamedTuple):
    """What distinguishes one norm from another; everything else is shared.

    groups: sets of channels with statistics of their own inside each sample (C: instance norm,
        1: layer norm), or 0 for statistics of one channel across the batch.
    """

    groups: int
    eps: float
    activation: str | None = None
    negative_slope: float = 0.2
    residual_after_activation: bool = False


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and the affine are computed for an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(stat: Tensor, n: int, c: int, groups: int) -> Tensor:
    """Statistics (C,) or (N, groups) as (N, C, 1) or (1, C, 1)."""
    if groups == 0:
        return stat.view(1, c, 1)
    return stat.view(n, groups, 1).expand(n, groups, c // groups).reshape(n, c, 1)


def _rstd(var: Tensor, dtype: torch.dtype, n: int, c: int, spec: NormSpec) -> Tensor:
    """1 / sqrt(var + eps), (N, C, 1) or (1, C, 1), rounded once."""
    return _per_channel((var.double() + spec.eps).rsqrt().to(dtype), n, c, spec.groups)


def _rows(table: Tensor | None, labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The affine table (K, C) as (N, C, 1), or (1, C, 1) when all samples share its one row."""
    if table is None:
        return None
    table = table.to(dtype)
    return (table if labels is None else table[labels]).unsqueeze(-1)


def _set_mean(planes: Tensor, groups: int) -> Tensor:
    """Means over S, (N, C), merged into means over each statistics set: (C,) or (N, groups)."""
    n, c = planes.shape
    return planes.mean(0) if groups == 0 else planes.view(n, groups, c // groups).mean(2)


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, biased variance and the mean's rounding error of every set, and x minus the mean.

    x: (N, C, S) in the statistics dtype. Returns (C,) or (N, groups), three times, and (N, C, S).
    The true mean is mean + error (Knuth's TwoSum): far from 0 the error is all that a rounded
    mean gets wrong.
    """
    n, c, s = x.shape
    if x.numel() == 0:
        zeros = x.new_zeros((c,) if groups == 0 else (n, groups))
        return zeros, zeros, zeros, x
    inplace = not torch.is_grad_enabled()
    first = (x[0, :, 0] if groups == 0 else x[:, :: c // groups, 0]).detach()
    centred = x - _per_channel(first, n, c, groups)
    offset = _set_mean(centred.mean(2), groups)
    mean = first + offset
    part = mean - first
    error = ((first - (mean - part)) + (offset - part)).detach()
    if inplace:  # vector_norm reads once and needs no temporary
        torch.sub(x, _per_channel(mean, n, c, groups), out=centred)
        power = torch.linalg.vector_norm(centred, dim=2).square_().div_(s)
    else:
        centred = x - _per_channel(mean, n, c, groups)
        power = centred.square().mean(2)
    return mean, _set_mean(power, groups) - error.square(), error, centred


def _activate(y: Tensor, spec: NormSpec) -> Tensor:
    inplace = not torch.is_grad_enabled()
    if spec.activation == "relu":
        return F.relu(y, inplace)
    if spec.activation == "leaky_relu":
        return F.leaky_relu(y, spec.negative_slope, inplace)
    if spec.activation == "silu":
        return F.silu(y, inplace)
    return y


def forward(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,  # (K, C)
    labels: Tensor | None,  # (N,), or None: row 0 for all
    residual: Tensor | None,  # (N, C, S)
    mean: Tensor | None,  # given statistics (C,): evaluation mode
    var: Tensor | None,
    spec: NormSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C, S) in x's dtype, and the mean and biased variance that were used."""
    n, c, _ = x.shape
    dtype = stat_dtype(x.dtype)
    inplace = not torch.is_grad_enabled()
    wide = x.to(dtype)
    if mean is None or var is None:
        mean, var, error, y = moments(wide, spec.groups)
    else:
        y, error = wide - mean.to(dtype).view(1, c, 1), None
    scale = _rstd(var, dtype, n, c, spec)
    gain, shift = _rows(weight, labels, dtype), _rows(bias, labels, dtype)
    if gain is not None:
        scale = scale * gain
    if error is not None:  # too small to cancel, so it may go into the bias
        correction = _per_channel(error, n, c, spec.groups) * scale
        shift = -correction if shift is None else shift - correction
    if shift is None:
        y = y.mul_(scale) if inplace else y * scale
    elif inplace:
        torch.addcmul(shift, y, scale, out=y)
    else:
        y = torch.addcmul(shift, y, scale)
    if residual is not None and not spec.residual_after_activation:
        y = y.add_(residual) if inplace else y + residual.to(dtype)
    y = _activate(y, spec)
    if residual is not None and spec.residual_after_activation:
        y = y.add_(residual) if inplace else y + residual.to(dtype)
    return y.to(x.dtype), mean, var


def _activation_grad(dy: Tensor, pre: Tensor, spec: NormSpec) -> Tensor:
    """dy times the activation's derivative at `pre`; overwrites `pre`."""
    if spec.activation == "relu":
        return torch.ops.aten.threshold_backward(dy, pre, 0)
    if spec.activation == "leaky_relu":
        return torch.ops.aten.leaky_relu_backward(dy, pre, spec.negative_slope, False)
    return torch.ops.aten.silu_backward(dy, pre)


def backward(
    dy: Tensor,  # (N, C, S)
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # only where the activation's derivative depends on it
    mean: Tensor,
    var: Tensor,
    spec: NormSpec,
    given_stats: bool,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(dx, dweight, dbias, g): g is dy behind the activation, the gradient of an inner residual.

    Not differentiable; second derivatives go through `forward` (see `gannorm.autograd`).
    """
    n, c, s = x.shape
    dtype = stat_dtype(x.dtype)
    rstd = _rstd(var, dtype, n, c, spec)
    x_hat = (x.to(dtype) - _per_channel(mean.to(dtype), n, c, spec.groups)).mul_(rstd)
    gain, shift = _rows(weight, labels, dtype), _rows(bias, labels, dtype)
    g = dy.to(dtype)
    if spec.activation is not None:
        pre = x_hat if gain is None else x_hat * gain
        if shift is not None:
            pre = pre + shift
        if residual is not None:
            pre = pre + residual
        g = _activation_grad(g, pre, spec)
    # One reduction serves dx, dweight and dbias: sum(g) and sum(g * x_hat) per plane, (N, C).
    g_sum = g.sum(2)
    gx_sum = (g * x_hat).sum(2)
    dx = None
    if need_dx:
        scale = rstd if gain is None else rstd * gain
        if given_stats:
            dx = (g * scale).to(x.dtype)
        else:
            row = None if gain is None else gain.squeeze(-1)
            a = _set_mean((g_sum if row is None else g_sum * row) / s, spec.groups)
            b = _set_mean((gx_sum if row is None else gx_sum * row) / s, spec.groups)
            a, b = (_per_channel(t, n, c, spec.groups) * rstd for t in (a, b))
            dx = torch.addcmul(g * scale, x_hat, b, value=-1).sub_(a).to(x.dtype)
    dweight = table_grad(gx_sum, weight, labels)
    dbias = table_grad(g_sum, bias, labels)
    return dx, dweight, dbias, g.to(dy.dtype)


def table_grad(sums: Tensor, table: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Per-sample sums (N, C) added up per row of the table (K, C), in a fixed order."""
    if table is None:
        return None
    if labels is None:
        return sums.sum(0, keepdim=True).to(table.dtype)
    grad = sums.new_zeros(table.shape)
    return grad.index_put_((labels,), sums, accumulate=True).to(table.dtype)  # sorts, on a GPU
