"""The reference's twin for an eager CPU: torch's own normalization kernels where they are exact.

They read the input fewer times than a composition of torch ops can, but lose digits far from 0,
where x * scale + shift cancels, and near-constant sets. So each call looks at its statistics first,
and one with a set out of reach goes to `gannorm.reference` whole.

Without labels (`norm`) torch's differentiable operators serve, with the epilogue in place. An
affine by label (`forward`, `backward`) is one scale and one shift for each plane, applied by batch
norm's evaluation kernel. Tried and dropped: working through the batch in chunks that stay in the
cache (slower: more calls, and each wakes the other threads).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gannorm import reference
from gannorm.reference import NormSpec, finish, table_rows

FAR = 8.0  # |mean| / std beyond which torch's arithmetic is left

aten = torch.ops.aten


def _usable(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and x.numel() > 0


def _in_reach(mean: Tensor, rstd: Tensor, eps: float) -> bool:
    """Whether no set is far from 0, near-constant, or has an rstd whose cube is beyond float32.

    A set with NaN or Inf is in reach: it must not change how the others are computed.
    """
    flattest = 0.99 * eps**-0.5 if eps > 1e-24 else 1e12
    distance = (mean * rstd).abs_()
    low, high = rstd.aminmax()
    if float(distance.max()) <= FAR and float(low) > 1e-12 and float(high) < flattest:
        return True
    far = (distance > FAR) | ~(rstd > 1e-12) & mean.isfinite()
    return not bool((far | (rstd >= flattest) & (mean != 0)).any())


def norm(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (1, C)
    bias: Tensor | None,
    residual: Tensor | None,  # (N, C, S)
    given: tuple[Tensor, Tensor] | None,
    spec: NormSpec,
    need_stats: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """A norm without labels, differentiable as torch's own: y and its statistics, or None."""
    if not _usable(x):
        return None
    n, c, s = x.shape
    weight, bias = (None if t is None else t.view(c).to(x.dtype) for t in (weight, bias))
    if given is not None:
        mean, var = (t.to(x.dtype) for t in given)
        if not _in_reach(mean, (var + spec.eps).rsqrt(), spec.eps):
            return None
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, spec.eps)
        return _finish(y, residual, spec), None
    if 0 < spec.groups < c:
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, s, spec.groups, spec.eps)
    else:
        rows = x
        if spec.groups:
            rows = x.view(1, n * c, s)
            weight, bias = (None if t is None else t.repeat(n) for t in (weight, bias))
        y, mean, rstd = torch.native_batch_norm(rows, weight, bias, None, None, True, 0.0, spec.eps)
        if spec.groups:  # no view: in place on one autograd copies
            y = aten._unsafe_view(y, (n, c, s))
            mean, rstd = mean.view(n, c), rstd.view(n, c)
    with torch.no_grad():
        if not _in_reach(mean, rstd, spec.eps):
            return None
        stats = None
        if need_stats:
            var = rstd.double().pow(-2).sub_(spec.eps).clamp_(min=0).to(x.dtype)
            stats = torch.stack((mean, torch.zeros_like(mean), rstd, var))
    return _finish(y, residual, spec), stats


def _finish(y: Tensor, residual: Tensor | None, spec: NormSpec) -> Tensor:
    """The epilogue, in place where autograd allows."""
    if residual is not None and not spec.residual_after_activation:
        y = y.add_(residual)
    if spec.activation == "relu":
        y = y.relu_()
    elif spec.activation == "leaky_relu":
        y = F.leaky_relu(y, spec.negative_slope, inplace=spec.negative_slope >= 0)
    elif spec.activation == "silu":
        y = F.silu(y)
    return y + residual if residual is not None and spec.residual_after_activation else y


def forward(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # (N, C, S)
    given: tuple[Tensor, Tensor] | None,
    spec: NormSpec,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    if labels is None or not _usable(x):
        return reference.forward(x, weight, bias, labels, residual, given, spec)
    n, c, s = x.shape
    if given is not None:
        mean, var = (t.to(x.dtype) for t in given)
        out = torch.empty_like(x)
    else:
        # Every plane's moments; the normalized planes are overwritten.
        rows = x.view(1, n * c, s)
        out, mean, rstd = torch.native_group_norm(rows, None, None, 1, n * c, s, n * c, 0.0)
        out = aten._unsafe_view(out, (n, c, s))  # no view: a caller may work in place on it
        mean, var = mean.view(n, c).double(), rstd.view(n, c).double().pow(-2)
        if spec.groups == 0:
            centre = mean.mean(0)
            var = (var + (mean - centre).square_()).mean(0)
            mean = centre
    rstd = (var.double() + spec.eps).rsqrt_()
    mean, var = mean.to(x.dtype), var.to(x.dtype)
    if not _in_reach(mean, rstd.to(x.dtype), spec.eps):
        return reference.forward(x, weight, bias, labels, residual, given, spec)
    scale, shift = _coefficients(x, weight, bias, labels, mean, rstd, spec)
    y = finish(_scaled(x, scale, shift, out), residual, spec)
    return y, torch.stack((mean, torch.zeros_like(mean), rstd.to(x.dtype), var))


def backward(
    dy: Tensor,  # (N, C, S)
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
    given: bool,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """As `reference.backward`."""
    mean, _, rstd, _ = stats
    usable = _usable(x) and dy.dtype == x.dtype
    if labels is None or not usable or not _in_reach(mean, rstd, spec.eps):
        return reference.backward(
            dy, x, weight, bias, labels, residual, stats, spec, given, need_dx
        )
    n, c, s = x.shape
    scale, shift = _coefficients(x, weight, bias, labels, mean, rstd, spec)
    g = dy.contiguous()
    if spec.activation is not None:
        pre = _scaled(x, scale, shift, torch.empty_like(x))
        if residual is not None:
            pre.add_(residual)
        g = reference.activation_grad(g, pre, spec)
    # Every plane a group of its own: the sums of g * x_hat and of g over each.
    mean, rstd = (_planes(t, n, c, spec.groups).expand(n, c) for t in (mean, rstd))
    flat = (t.reshape(1, n * c) for t in (mean, rstd))
    sums = aten.native_group_norm_backward(
        g, x, *flat, None, 1, n * c, s, n * c, [False, True, True]
    )
    gx_sum, g_sum = (t.view(n, c) for t in sums[1:])
    dx = None
    if need_dx and given:
        dx = g * scale.unsqueeze(-1)
    elif need_dx:
        gain = table_rows(weight, labels, torch.float64)
        a, b = ((t if gain is None else t * gain.squeeze(-1)).double() / s for t in (g_sum, gx_sum))
        if spec.groups == 0:
            a, b = (t.mean(0, keepdim=True).expand(n, c) for t in (a, b))
        slope = -b * rstd.double().square()
        start = -a * rstd.double() - slope * mean.double()
        dx = _scaled(x, slope, start, torch.empty_like(x))
        dx.addcmul_(g, scale.unsqueeze(-1))
    dweight = reference.table_grad(gx_sum, weight, labels)
    return dx, dweight, reference.table_grad(g_sum, bias, labels), g


def _planes(stat: Tensor, n: int, c: int, groups: int) -> Tensor:
    """Statistics (C,) or (N, C) as (1, C) or (N, C)."""
    return stat.unsqueeze(0) if groups == 0 else stat


def _scaled(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """x * scale + shift into `out`: one number for each plane (N, C)."""
    n, c, s = x.shape
    scale, shift = (t.to(x.dtype).reshape(n * c) for t in (scale, shift))
    zeros, ones = x.new_zeros(n * c), x.new_ones(n * c)
    rest = x.new_empty(0), x.new_empty(0)
    rows = (t.view(1, n * c, s) for t in (x, out))
    torch.native_batch_norm(
        next(rows), scale, shift, zeros, ones, False, 0.0, 0.0, out=(next(rows), *rest)
    )
    return out


def _coefficients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor,
    mean: Tensor, rstd: Tensor, spec: NormSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and shift of every plane (N, C); rounded once."""
    n, c, _ = x.shape
    gain, offset = (table_rows(t, labels, torch.float64) for t in (weight, bias))
    mean, scale = (_planes(t, n, c, spec.groups).double() for t in (mean, rstd))
    scale = (scale if gain is None else scale * gain.squeeze(-1)).to(x.dtype).expand(n, c)
    shift = -mean * scale
    return scale, (shift if offset is None else shift + offset.squeeze(-1)).to(x.dtype)
