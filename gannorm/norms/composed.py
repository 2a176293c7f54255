"""Every norm in plain torch: the path for machines without a GPU, and the oracle for the kernels.

`forward` and `backward` have the signatures of those in `gannorm.kernels` and `gannorm.norms.cpu`,
and take torch's shapes. Under `torch.no_grad` `forward` works in place on its own temporaries; with
grad enabled it is a composition of differentiable torch ops, which is where second and higher
derivatives come from (`gannorm.norms.autograd`).

The variance is two-pass around a mean that is itself shifted by the first element of each set:
a constant plane of any magnitude then normalizes to exactly 0. Tried and dropped: `torch.var_mean`
(Welford) is 5 to 8 times slower on a CPU; E[x^2] - E[x]^2 cancels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
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


Given = tuple[Tensor, Tensor]  # mean and variance (C,): evaluation mode
# Running mean and variance (C,), the share by which they move, biased variance to running one.
Running = tuple[Tensor | None, Tensor | None, float, float]


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: they take the composition of torch ops."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which torch 2.11's compiler takes for True throughout."""
    return torch.compiler._is_exporting_flag


def recorded() -> bool:
    """Whether a graph is made of what runs (torch.export, torch.jit.trace), or a dispatch mode sees
    every op (make_fx, fake tensors, FLOP counters)."""
    if torch.compiler.is_compiling():
        return is_exporting()
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def may_overwrite() -> bool:
    """Whether nobody will differentiate, transform, compile or read in a graph what runs now.

    (A compiler sees to memory by itself, and breaks its graph at an `out=` that is channels_last.)
    """
    compiling = torch.compiler.is_compiling()
    return not (compiling or torch.is_grad_enabled() or transformed() or recorded())


def is_recomputed() -> bool:
    """Whether this forward pass runs inside a backward one: activation checkpointing's second run,
    whose batch has been counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def has_values(t: Tensor) -> bool:
    """Whether to go by what is in `t`: a fake, traced, compiled or transformed one is empty."""
    return is_eager(t) and not transformed()


def is_plain(t: Tensor | None) -> bool:
    """Whether `t` is no subclass, such as a fake tensor or a DTensor, that has ops of its own."""
    return t is None or type(t) in (Tensor, Parameter)


def is_eager(t: Tensor) -> bool:
    """Whether ops on `t` are carried out at once, if it is not `transformed`."""
    return not torch.compiler.is_compiling() and is_plain(t) and not recorded()


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and the affine are computed for an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def planes(t: Tensor) -> Tensor:
    """(N, C, ...) as (N, C, S)."""
    if t.dim() == 3:
        return t
    return t.reshape(t.shape[0], t.shape[1], math.prod(t.shape[2:]))


def shaped(t: Tensor, like: Tensor) -> Tensor:
    """(N, C, S) in the shape of `like`; its layout is that of what it was made from."""
    if like.dim() == 3:
        return t
    if not may_overwrite():
        return t.reshape(like.shape)
    # No view: a caller may work on the output in place.
    return torch.ops.aten._unsafe_view(t, like.shape)


def per_channel(stat: Tensor, n: int, c: int, groups: int) -> Tensor:
    """Statistics (C,) or (N, groups) as (N, C, 1) or (1, C, 1)."""
    if groups == 0:
        return stat.view(1, c, 1)
    return stat.view(n, groups, 1).expand(n, groups, c // groups).reshape(n, c, 1)


def table_rows(table: Tensor | None, labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The affine (C,) or (K, C) as (N, C, 1), or (1, C, 1) when all samples share its one row."""
    if table is None:
        return None
    table = (table if table.dim() == 2 else table.unsqueeze(0)).to(dtype)
    return (table if labels is None else table[labels]).unsqueeze(-1)


def _set_mean(planes: Tensor, groups: int) -> Tensor:
    """Means over S, (N, C), merged into means over each statistics set: (C,) or (N, groups)."""
    n, c = planes.shape
    return planes.mean(0) if groups == 0 else planes.view(n, groups, c // groups).mean(2)


def statistics(x: Tensor, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """Every set's mean, its rounding error, rstd and biased variance; and x minus the mean.

    x: (N, C, S) in the statistics dtype. Returns (4, C) or (4, N, groups), and (N, C, S). The true
    mean is mean + error (Knuth's TwoSum): far from 0 the error is all that a rounded mean gets
    wrong. Squares that float32 cannot hold are taken at 2^-80, so that the scale is right wherever
    the sum over a plane fits; their variance itself is infinite.
    """
    n, c, _ = x.shape
    if x.numel() == 0:
        return x.new_zeros((4, n, spec.groups) if spec.groups else (4, c)), x.clone()
    mean, error, scaled, unit, centred = spread(x, spec.groups)
    if unit is None:
        var = scaled
        rstd = (var + spec.eps).rsqrt()
    else:
        rstd = ((scaled.double() + spec.eps * unit.double().square()).rsqrt() * unit).to(x.dtype)
        var = scaled / unit / unit
    return torch.stack((mean, error, rstd, var)), centred


def spread(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Every set's mean and its rounding error, variance * unit^2, that unit, x - mean."""
    n, c, _ = x.shape
    first = (x[0, :, 0] if groups == 0 else x[:, :: c // groups, 0]).detach()
    centred = x - per_channel(first, n, c, groups)
    offset = _set_mean(centred.mean(2), groups)
    mean = first + offset
    part = mean - first
    error = ((first - (mean - part)) + (offset - part)).detach()
    if may_overwrite():
        torch.sub(x, per_channel(mean, n, c, groups), out=centred)
    else:
        centred = x - per_channel(mean, n, c, groups)
    ends = centred.detach()
    power = torch.maximum(ends.amax(2), -ends.amin(2))  # (N, C), without a copy of their size
    power = power.view(n, groups, -1).amax(2) if groups else power.amax(0)
    unit = torch.where(power > 2.0**60, 2.0**-80, 1.0) if x.dtype == torch.float32 else None
    if unit is None:
        scaled = _set_mean(centred.square().mean(2), groups) - error.square()
    else:
        small = centred * per_channel(unit, n, c, groups)
        scaled = _set_mean(small.square().mean(2), groups) - (error * unit).square()
    return mean, error, scaled, unit, centred


def forward(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,) or (K, C)
    bias: Tensor | None,
    labels: Tensor | None,  # (N,), or None: row 0 for all
    residual: Tensor | None,  # as x
    given: Given | None,
    spec: NormSpec,
    running: Running | None = None,  # to be moved
) -> tuple[Tensor, Tensor]:
    """y as x, and the statistics that were used (see `statistics`)."""
    added = None if residual is None else planes(residual)
    y, stats = _forward(planes(x), weight, bias, labels, added, given, spec)
    if running is not None:
        update_running(running, stats)
    return shaped(y, x), stats


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, given: Given | None, spec: NormSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`forward` of (N, C, S)."""
    c, dtype = x.shape[1], stat_dtype(x.dtype)
    wide = x.to(dtype)
    if given is None:
        stats, y = statistics(wide, spec)
    else:
        mean, var = (t.to(dtype) for t in given)
        rstd = (var.double() + spec.eps).rsqrt().to(dtype)
        stats = torch.stack((mean, torch.zeros_like(mean), rstd, var))
        y = wide - mean.view(1, c, 1)
    y = applied(y, stats, weight, bias, labels, residual, given, spec)
    return y.to(x.dtype), stats


def applied(
    y: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, given: Given | None, spec: NormSpec,
) -> Tensor:  # fmt: skip
    """y, which is x - mean (N, C, S), scaled, shifted and through the epilogue."""
    n, c, _ = y.shape
    dtype, inplace = y.dtype, may_overwrite()
    scale = per_channel(stats[2], n, c, spec.groups)
    gain, shift = table_rows(weight, labels, dtype), table_rows(bias, labels, dtype)
    if gain is not None:
        scale = scale * gain
    if given is None:  # the mean's error is too small to cancel, so it may go into the bias
        correction = per_channel(stats[1].detach(), n, c, spec.groups) * scale
        shift = -correction if shift is None else shift - correction
    if shift is None:
        y = y.mul_(scale) if inplace else y * scale
    elif inplace:
        torch.addcmul(shift, y, scale, out=y)
    else:
        y = torch.addcmul(shift, y, scale)
    return finish(y, residual, spec, inplace)


def finish(y: Tensor, residual: Tensor | None, spec: NormSpec, inplace: bool) -> Tensor:
    """The epilogue behind the affine; `inplace` may write over y, as far as autograd allows."""
    after = spec.residual_after_activation
    free = inplace and not torch.is_grad_enabled()  # nobody will ask for what is written over
    if residual is not None and not after:
        y = y.add_(residual) if inplace else y + residual.to(y.dtype)
    if spec.activation == "relu":
        y = F.relu(y, inplace)
    elif spec.activation == "leaky_relu":
        y = F.leaky_relu(y, spec.negative_slope, inplace and (free or spec.negative_slope >= 0))
    elif spec.activation == "silu":
        y = F.silu(y, free)
    if residual is not None and after:
        y = y.add_(residual) if free else y + residual.to(y.dtype)
    return y


def activation_grad(dy: Tensor, pre: Tensor, spec: NormSpec) -> Tensor:
    """dy times the activation's derivative at `pre`, written over `pre`."""
    aten = torch.ops.aten
    if spec.activation == "relu":
        return aten.threshold_backward.grad_input(dy, pre, 0, grad_input=pre)
    if spec.activation == "leaky_relu":
        slope = spec.negative_slope
        return aten.leaky_relu_backward.grad_input(dy, pre, slope, False, grad_input=pre)
    return aten.silu_backward.grad_input(dy, pre, grad_input=pre)


def backward(
    dy: Tensor,  # (N, C, ...)
    x: Tensor,
    weight: Tensor | None,  # (C,) or (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # only where the activation's derivative depends on it
    stats: Tensor,  # as `forward` returned them
    spec: NormSpec,
    given: bool,  # the statistics were
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """(dx, dweight, dbias, g): g is dy behind the activation, the gradient of an inner residual.

    Not differentiable; second derivatives go through `forward` (see `gannorm.norms.autograd`).
    """
    added = None if residual is None else planes(residual)
    dx, dweight, dbias, g = _backward(
        planes(dy), planes(x), weight, bias, labels, added, stats, spec, given, need_dx
    )
    return None if dx is None else shaped(dx, x), dweight, dbias, shaped(g, x)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, spec: NormSpec, given: bool, need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """`backward` of (N, C, S)."""
    s = x.shape[2]
    x_hat, g, gain, rstd, g_sum, gx_sum = gradient_sums(
        dy, x, weight, bias, labels, residual, stats, spec
    )
    dx = None
    if need_dx and given:
        dx = (g * (rstd if gain is None else rstd * gain)).to(x.dtype)
    elif need_dx:
        row = None if gain is None else gain.squeeze(-1)
        a = _set_mean((g_sum if row is None else g_sum * row) / s, spec.groups)
        b = _set_mean((gx_sum if row is None else gx_sum * row) / s, spec.groups)
        dx = input_gradient(g, x_hat, gain, rstd, a, b, spec).to(x.dtype)
    dweight = table_grad(gx_sum, weight, labels)
    dbias = table_grad(g_sum, bias, labels)
    return dx, dweight, dbias, g.to(dy.dtype)


def gradient_sums(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, spec: NormSpec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """x_hat and g (N, C, S), the gain of each plane, rstd, and the sums of g and of g * x_hat over
    each plane (N, C)."""
    n, c, _ = x.shape
    dtype = stat_dtype(x.dtype)
    mean, error, rstd = (per_channel(t, n, c, spec.groups) for t in stats[:3])
    x_hat = (x.to(dtype) - mean).sub_(error).mul_(rstd)
    gain, shift = table_rows(weight, labels, dtype), table_rows(bias, labels, dtype)
    g = dy.to(dtype)
    if spec.activation is not None:
        pre = x_hat.clone() if gain is None else x_hat * gain
        if shift is not None:
            pre = pre + shift
        if residual is not None:
            pre = pre + residual
        g = activation_grad(g, pre, spec)
    # One reduction serves dx, dweight and dbias.
    return x_hat, g, gain, rstd, g.sum(2), (g * x_hat).sum(2)


def input_gradient(
    g: Tensor, x_hat: Tensor, gain: Tensor | None, rstd: Tensor, a: Tensor, b: Tensor,
    spec: NormSpec,
) -> Tensor:  # fmt: skip
    """a, b: means over each set of gain * g and of that times x_hat."""
    n, c, _ = g.shape
    a, b = (per_channel(t, n, c, spec.groups) * rstd for t in (a, b))
    scale = rstd if gain is None else rstd * gain
    return torch.addcmul(g * scale, x_hat, b, value=-1).sub_(a)


@torch.no_grad()
def update_running(running: Running, stats: Tensor) -> None:
    """Move the running statistics (C,) towards the batch's; non-finite ones never enter."""
    *buffers, momentum, bessel = running
    mean, _, _, var = stats.detach()
    if mean.dim() == 2:  # (N, C): every sample's own
        mean, var = mean.mean(0), var.mean(0)
    pairs = [
        (buffer, new.to(buffer.dtype))
        for buffer, new in zip(buffers, (mean, var * bessel), strict=True)
        if buffer is not None
    ]
    finite = torch.stack([new.isfinite() for _, new in pairs]).all(0)
    for buffer, new in pairs:
        buffer.lerp_(torch.where(finite, new, buffer), momentum)


def table_grad(sums: Tensor, table: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Per-sample sums (N, C) added up per row of the table (K, C), in a fixed order."""
    if table is None:
        return None
    if labels is None:
        return sums.sum(0).view(table.shape).to(table.dtype)
    grad = sums.new_zeros(table.shape)
    if sums.is_cuda:  # sorts there; index_add_ would add in any order, as this does on a CPU
        return grad.index_put_((labels,), sums, accumulate=True).to(table.dtype)
    return grad.index_add_(0, labels, sums).to(table.dtype)
