"""The reference's twin for an eager CPU: torch's own kernels where they are exact.

They read the input fewer times than a composition of torch ops can, but lose digits far from 0,
where x * scale + shift cancels, and near-constant sets. So each call looks at its statistics first,
and one with a set out of reach goes to `gannorm.reference` whole.

Moments come from group norm over small pieces of the planes, merged in float64: its vectorized
sums are several times faster than batch norm's, and so many of them more exact; on small inputs the
merging costs more than that gains, and without labels batch norm's own serve. Without labels
(`norm`) torch's own derivatives serve, with the epilogue in place. An affine by label (`forward`,
`backward`) is one scale and one shift for each plane, applied by batch norm's evaluation kernel.
Tried and dropped: working through the batch in chunks that stay in the
cache (slower: more calls, and each wakes the other threads).
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gannorm import reference
from gannorm.reference import NormSpec, Running, finish, table_rows, update_running

PIECE = 64  # elements at least, or group norm is the slower one
SMALL = 2**20  # elements, below which torch's own batch norm is faster than all of this
LONGEST = 4096  # elements at most,
PIECES = 8  # and pieces of a set at least, or group norm is the less exact one
FAR = 8.0  # |mean| / std beyond which torch's arithmetic is left

aten = torch.ops.aten
unsafe_view = aten._unsafe_view.default


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
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,
    residual: Tensor | None,  # as x
    given: tuple[Tensor, Tensor] | None,
    running: Running | None,
    spec: NormSpec,
) -> Tensor | None:
    """A norm without labels, differentiable as torch's own; None where that is not exact."""
    if not _usable(x):
        return None
    n, c = x.shape[:2]
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if given is not None:
        mean, var = (t.to(x.dtype) for t in given)
        if not _in_reach(mean, (var + spec.eps).rsqrt(), spec.eps):
            return None
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, spec.eps)
        return finish(y, residual, spec, True)
    if 0 < spec.groups < c:
        size = x.numel() // (n * c)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, size, spec.groups, spec.eps)
        with torch.no_grad():
            reached = _in_reach(mean, rstd, spec.eps)
        return finish(y, residual, spec, True) if reached else None
    rows = x
    if spec.groups:
        rows = x.view(1, n * c, -1)
        weight, bias = (None if t is None else t.repeat(n) for t in (weight, bias))
    samples = n if spec.groups else 1
    if x.numel() < SMALL:
        y, mean, rstd = torch.native_batch_norm(rows, weight, bias, None, None, True, 0.0, spec.eps)
        with torch.no_grad():
            if not _in_reach(mean, rstd, spec.eps):
                return None
            if running is not None:
                _move(running, mean.double(), rstd.double().pow(-2) - spec.eps, samples)
    else:
        with torch.no_grad():
            out, mean, var = _moments(rows)
            rstd = (var + spec.eps).rsqrt_()
            if not _in_reach(mean, rstd, spec.eps):
                return None
        _move(running, mean, var, samples)
        y = _BatchNorm.apply(rows, weight, bias, (out, mean, rstd), spec.eps)
    if spec.groups:
        y = unsafe_view(y, x.shape)  # no view: in place on one autograd copies
    return finish(y, residual, spec, True)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor like x (N, C, ...) to write over; every channel's mean and biased variance (C,),
    in float64."""
    n, c = x.shape[:2]
    piece = _piece(x.numel() // (n * c), n)
    if piece is None:
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return torch.empty_like(x), mean.double(), var.double()
    count = x.numel() // piece
    pieces = x.view(1, count, piece)
    out, means, rstds = torch.native_group_norm(pieces, None, None, 1, count, piece, count, 0.0)
    means, variances = (t.view(n, c, -1).double() for t in (means, rstds))
    squares = variances.pow_(-2).addcmul_(means, means)
    mean = means.mean((0, 2))
    # In float64 nothing that is in reach cancels.
    out = unsafe_view(out, x.shape)
    return out, mean, squares.mean((0, 2)).addcmul_(mean, mean, value=-1)


@lru_cache
def _piece(size: int, planes: int) -> int | None:
    """Into pieces of how many elements to cut planes of `size`, of which a set has `planes`."""
    fewest = max(-(-PIECES // planes), -(-size // LONGEST))
    counts = (k for k in range(fewest, size // PIECE + 1) if size % k == 0)
    count = next(counts, None)
    return None if count is None else size // count


class _BatchNorm(torch.autograd.Function):
    """Batch norm whose statistics are at hand, with torch's own derivatives."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        made: tuple[Tensor, Tensor, Tensor], eps: float,
    ) -> Tensor:  # fmt: skip
        out, mean, rstd = made
        scale = (rstd if weight is None else rstd * weight).to(x.dtype)
        shift = -mean * scale  # of the rounded scale: so x * scale cancels near the mean
        _affine(x, scale, shift if bias is None else shift + bias, out)
        ctx.save_for_backward(x, weight, mean.to(x.dtype), rstd.to(x.dtype))
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grads = aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, rstd, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *grads, None, None


@torch.no_grad()
def _move(running: Running | None, mean: Tensor, var: Tensor, samples: int = 1) -> None:
    """`reference.update_running` by statistics (samples * C,), in few steps if all are finite."""
    if running is None:
        return
    mean, var = (t.view(samples, -1).mean(0) for t in (mean, var))
    *buffers, momentum, bessel = running
    pairs = [
        (buffer, new.to(buffer.dtype))
        for buffer, new in zip(buffers, (mean, var * bessel), strict=True)
        if buffer is not None
    ]
    if not all(math.isfinite(float(new.sum())) for _, new in pairs):
        update_running(running, torch.stack((mean, mean, mean, var)))
        return
    for buffer, new in pairs:
        buffer.lerp_(new, momentum)


def forward(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # (N, C, S)
    given: tuple[Tensor, Tensor] | None,
    spec: NormSpec,
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; moves the running statistics too."""

    def plainly() -> tuple[Tensor, Tensor]:
        y, stats = reference.forward(x, weight, bias, labels, residual, given, spec)
        update_running(running, stats)
        return y, stats

    if labels is None or not _usable(x):
        return plainly()
    if given is not None:
        mean, var = (t.double() for t in given)
        out = torch.empty_like(x)
    else:
        n, c, size = x.shape
        out, mean, var = _moments(x.view(1, n * c, size) if spec.groups else x)
        shape = (n, c) if spec.groups else (c,)
        out, mean, var = unsafe_view(out, x.shape), mean.view(shape), var.view(shape)
    rstd = (var + spec.eps).rsqrt_()
    if not _in_reach(mean, rstd, spec.eps):
        return plainly()
    _move(running, mean, var)
    scale, shift = _coefficients(x, weight, bias, labels, mean, rstd, spec)
    inplace = not torch.is_grad_enabled()
    y = finish(_scaled(x, scale, shift, out), residual, spec, inplace)
    return y, torch.stack((mean, torch.zeros_like(mean), rstd, var)).to(x.dtype)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.backward`; no g where nobody needs it."""
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
        # Over g where it is ours and not the residual's gradient: new memory costs as much again.
        ours = spec.activation is not None and residual is None
        dx = _scaled(g, scale, start, g if ours else torch.empty_like(x))
        dx.addcmul_(x, slope.to(x.dtype).expand(n, c).unsqueeze(-1))
    dweight = reference.table_grad(gx_sum, weight, labels)
    return dx, dweight, reference.table_grad(g_sum, bias, labels), None if dx is g else g


def _planes(stat: Tensor, n: int, c: int, groups: int) -> Tensor:
    """Statistics (C,) or (N, C) as (1, C) or (N, C)."""
    return stat.unsqueeze(0) if groups == 0 else stat


def _scaled(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """x * scale + shift into `out`: one number for each plane (N, C)."""
    n, c, s = x.shape
    rows, written = (t.view(1, n * c, s) for t in (x, out))
    _affine(rows, scale.reshape(n * c), shift.reshape(n * c), written)
    return out


def _affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """x (N, C, ...) * scale + shift (C,) into `out`, which may be x."""
    zeros, ones = x.new_zeros(len(scale)), x.new_ones(len(scale))
    rest = x.new_empty(0), x.new_empty(0)
    torch.native_batch_norm(
        x, scale.to(x.dtype), shift.to(x.dtype), zeros, ones, False, 0.0, 0.0, out=(out, *rest)
    )


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
