"""The kernels as registered torch operators, which is how `torch.compile` sees them.

Eager calls do not come here: an operator's dispatch costs more than the kernel's launch. On the
torch backend the compiler traces the torch ops themselves. Compiled code is differentiable once,
as all of torch.compile's is; eager code any number of times (`gannorm.norms.autograd`).
"""

from typing import Any

import torch
from torch import Tensor, library

from gannorm.norms.composed import NormSpec, stat_dtype


@library.custom_op("gannorm::norm", mutates_args=())
def norm(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,  # (N,)
    residual: Tensor | None,  # (N, C, S)
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual_after_activation: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.forward`: y and the statistics."""
    import gannorm.kernels as kernels

    spec = NormSpec(groups, eps, activation, negative_slope, residual_after_activation)
    given = None if mean is None or var is None else (mean, var)
    return kernels.forward(x, weight, bias, labels, residual, given, spec)


@norm.register_fake
def _(x, weight, bias, labels, residual, mean, var, groups, *_):
    shape = (4, x.shape[0], groups) if groups else (4, x.shape[1])
    return _like(x), x.new_empty(shape, dtype=stat_dtype(x.dtype))


def _like(x: Tensor) -> Tensor:
    from gannorm.kernels.layout import dense_strides

    return x.new_empty_strided(x.shape, dense_strides(x))


@library.custom_op("gannorm::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    groups: int,
    eps: float,
    activation: str | None,
    negative_slope: float,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.backward`: dx, dweight, dbias, dresidual; empty where there is none."""
    import gannorm.kernels as kernels

    spec = NormSpec(groups, eps, activation, negative_slope)
    grads = kernels.backward(dy, x, weight, bias, labels, residual, stats, spec, given, True)
    dx, dweight, dbias, dresidual = (x.new_empty(0) if g is None else g for g in grads)
    return dx, dweight, dbias, dresidual


@norm_backward.register_fake
def _(dy, x, weight, bias, labels, residual, *_):
    tables = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return _like(x), *tables, x.new_empty(0) if residual is None else _like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, residual, mean, _, groups, eps, activation, slope, after = inputs
    ctx.folded = activation is not None and not after
    ctx.has_residual = residual is not None
    ctx.constants = (groups, eps, activation, slope, mean is not None)
    inner = residual if ctx.folded else None
    ctx.save_for_backward(x, weight, bias, labels, inner, output[1])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dweight, dbias, dresidual = torch.ops.gannorm.norm_backward(dy, *saved, *ctx.constants)
    residual = None
    if ctx.has_residual:
        residual = dresidual if ctx.folded else dy
    weight, bias = saved[1], saved[2]
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        residual,
        *([None] * 7),
    )


norm.register_autograd(_backward, setup_context=_setup_context)
