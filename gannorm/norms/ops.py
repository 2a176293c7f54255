"""The kernels as registered torch operators, which is how `torch.compile` sees them.

Eager calls do not come here: an operator's dispatch costs more than the kernel's launch. On the
torch backend the compiler traces the torch ops themselves. Compiled code is differentiable once,
as all of torch.compile's is; eager code any number of times (`gannorm.norms.autograd`).
"""

from typing import Any

import torch
from torch import Tensor, library

from gannorm.norms import composed
from gannorm.norms.autograd import Call
from gannorm.norms.backend import module_for, parts_for
from gannorm.norms.composed import NormSpec, stat_dtype
from gannorm.norms.sync import Synced


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
    grads = torch.ops.gannorm.norm_backward(dy, *ctx.saved_tensors, *ctx.constants)
    return *_present(ctx, dy, *grads), *([None] * 7)


def _present(
    ctx: Any, dy: Tensor, dx: Tensor | None, dweight: Tensor, dbias: Tensor, dresidual: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, labels, residual; None where there is none."""
    _, weight, bias, *_ = ctx.saved_tensors
    residual = None
    if ctx.has_residual:
        residual = dresidual if ctx.folded else dy
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
        residual,
    )


norm.register_autograd(_backward, setup_context=_setup_context)


def together(
    tensors: Any,  # x, weight, bias, labels, residual, running mean and variance
    spec: NormSpec, group: str, degenerate: str = "beta", var_estimator: str = "unbiased",
    folded: bool = False,
) -> Call:  # fmt: skip
    """A batch norm with other processes; who runs this one's part is found where that runs."""
    x, _, _, labels, *_ = tensors
    compiling = torch.compiler.is_compiling()
    parts = None if compiling else parts_for(tensors, spec)
    return Call(
        spec, composed if compiling else module_for(x), folded=folded,
        check_labels=labels is not None,  # before the exchange, or the others would wait
        sync=Synced(group, parts, spec, degenerate, var_estimator),
    )  # fmt: skip


@library.custom_op("gannorm::sync_norm", mutates_args=())
def sync_norm(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,) or (K, C)
    bias: Tensor | None,
    labels: Tensor | None,  # (N,)
    residual: Tensor | None,  # as x
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual_after_activation: bool,
    group: str,
    degenerate: str,
) -> tuple[Tensor, Tensor]:
    """A batch norm with other processes, on any backend: y, and the statistics (5, C)."""
    spec = NormSpec(0, eps, activation, negative_slope, residual_after_activation)
    tensors = x, weight, bias, labels, residual
    call = together((*tensors, None, None), spec, group, degenerate)
    y, stats = call.forward(*tensors, (None, None, 0.0))
    return _laid_out(y, x), stats


@sync_norm.register_fake
def _(x, *_):
    return torch.empty_like(x), x.new_empty((5, x.shape[1]), dtype=stat_dtype(x.dtype))


def _laid_out(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the layout of `torch.empty_like`, whatever backend made it."""
    like = torch.empty_like(x)
    return t if t.stride() == like.stride() else like.copy_(t)


@library.custom_op("gannorm::sync_norm_backward", mutates_args=())
def sync_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
    group: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual; empty where there is none."""
    tensors = x, weight, bias, labels, residual
    spec = NormSpec(0, eps, activation, negative_slope)
    call = together((*tensors, None, None), spec, group)
    dx, dweight, dbias, g = call.backward(dy, *tensors, stats, need_dx)
    dx, dresidual = (
        _laid_out(t, x) if t is not None and wanted else x.new_empty(0)
        for t, wanted in ((dx, need_dx), (g, residual is not None))
    )
    dweight, dbias = (x.new_empty(0) if t is None else t for t in (dweight, dbias))
    return dx, dweight, dbias, dresidual


@sync_norm_backward.register_fake
def _(dy, x, weight, bias, labels, residual, stats, eps, activation, slope, group, need_dx):
    tables = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    return dx, *tables, x.new_empty(0) if residual is None else torch.empty_like(x)


def _setup_sync(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, residual, eps, activation, slope, after, group, _ = inputs
    ctx.folded = activation is not None and not after
    ctx.has_residual = residual is not None
    ctx.constants = (eps, activation, slope, group)
    inner = residual if ctx.folded else None
    ctx.save_for_backward(x, weight, bias, labels, inner, output[1])


def _sync_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_dx = ctx.needs_input_grad[0]
    dx, *others = torch.ops.gannorm.sync_norm_backward(
        dy, *ctx.saved_tensors, *ctx.constants, need_dx
    )
    return *_present(ctx, dy, dx if need_dx else None, *others), *([None] * 6)


sync_norm.register_autograd(_sync_backward, setup_context=_setup_sync)
