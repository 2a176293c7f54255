"""One autograd Function for every norm and both backends, differentiable any number of times.

First order: a launcher (Triton) or its torch twin. Second order: the gradient is differentiated
through `reference.forward`, a composition of torch ops in which the statistics depend on the
input. Saving mean and variance as constants, or calling a raw kernel under `create_graph=True`,
would be silently wrong.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gannorm import native, reference
from gannorm.reference import NormSpec, Running

Tensors = tuple[Tensor | None, ...]


def planes(t: Tensor) -> Tensor:
    """(N, C, ...) as (N, C, S)."""
    if t.dim() == 3:
        return t
    return t.reshape(t.shape[0], t.shape[1], math.prod(t.shape[2:]))


def table(t: Tensor | None) -> Tensor | None:
    """(C,) or (K, C) as (K, C)."""
    return t if t is None or t.dim() == 2 else t.unsqueeze(0)


def run_forward(
    backend: ModuleType, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    labels: Tensor | None, residual: Tensor | None, given: tuple[Tensor, Tensor] | None,
    spec: NormSpec, running: Running | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`backend.forward` of torch's shapes: x and residual (N, C, ...), weight and bias (C,) or
    (K, C). Moves the running statistics."""
    moved = running if running is not None and _moves(backend, x, spec, running) else None
    if backend is native:  # takes shapes as they are
        y, stats = native.forward(x, weight, bias, labels, residual, given, spec, moved)
    else:
        extra = () if moved is None else (moved,)
        added = None if residual is None else planes(residual)
        y, stats = backend.forward(
            planes(x), table(weight), table(bias), labels, added, given, spec, *extra
        )
        if x.dim() != 3:  # no view: a caller may work on the output in place
            y = torch.ops.aten._unsafe_view(y, x.shape)
    if running is not None and moved is None:
        reference.update_running(running, stats)
    return y, stats


def _moves(backend: ModuleType, x: Tensor, spec: NormSpec, running: Running) -> bool:
    """Whether the backend moves these running statistics itself."""
    buffers = [t for t in running[:2] if t is not None]
    if backend is reference or spec.groups or not all(t.is_contiguous() for t in buffers):
        return False
    if backend is native:
        kind = reference.stat_dtype(x.dtype)
        return all(t.dtype == kind and not t.is_neg() for t in buffers)
    return x.dtype != torch.float64


def _run_backward(
    backend: ModuleType, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    labels: Tensor | None, residual: Tensor | None, stats: Tensor, spec: NormSpec, given: bool,
    need_dx: bool,
) -> Tensors:  # fmt: skip
    """`backend.backward` of torch's shapes."""
    if backend is native:
        return native.backward(dy, x, weight, bias, labels, residual, stats, spec, given, need_dx)
    added = None if residual is None else planes(residual)
    grads = backend.backward(
        planes(dy), planes(x), table(weight), table(bias), labels, added, stats, spec, given,
        need_dx,
    )  # fmt: skip
    return tuple(
        grad if grad is None or like is None or grad.shape == like.shape
        else grad.reshape(like.shape)
        for grad, like in zip(grads, (x, weight, bias, x), strict=True)
    )  # fmt: skip


class _NormBackward(torch.autograd.Function):
    """The first derivatives as a differentiable function of (dy, x, weight, bias, residual)."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,  # where the activation's derivative depends on it
        labels: Tensor | None,
        stats: Tensor,
        spec: NormSpec,
        backend: ModuleType,
        given: bool,
        need_dx: bool,
    ) -> Tensors:
        ctx.save_for_backward(dy, x, weight, bias, residual, labels, stats)
        ctx.spec, ctx.given = spec, given
        ctx.set_materialize_grads(False)
        dx, dweight, dbias, g = _run_backward(
            backend, dy, x, weight, bias, labels, residual, stats, spec, given, need_dx
        )
        return dx, dweight, dbias, None if residual is None else g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        if all(g is None for g in grads):
            return (None,) * 11
        *leaves, labels, stats = ctx.saved_tensors
        third_order = torch.is_grad_enabled()
        with torch.enable_grad():
            # A view keeps a tensor's history for the third order and ends the second order here.
            twins = [
                None if t is None
                else t.view_as(t) if t.requires_grad
                else t.detach().requires_grad_()
                for t in leaves
            ]  # fmt: skip
            dy, x, weight, bias, residual = twins
            assert dy is not None and x is not None
            given = (stats[0], stats[3]) if ctx.given else None
            y, _ = run_forward(reference, x, weight, bias, labels, residual, given, ctx.spec)
            pairs = zip((x, weight, bias, residual), grads, strict=True)
            wanted = [(t, g) for t, g in pairs if t is not None and g is not None]
            first = torch.autograd.grad(y, [t for t, _ in wanted], dy, create_graph=True)
            second = torch.autograd.grad(
                first,
                [t for t in twins if t is not None],
                [g for _, g in wanted],
                create_graph=third_order,
                allow_unused=True,
            )
        found = iter(second)
        return *(None if t is None else next(found) for t in twins), *([None] * 6)


def _composed_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    labels: Tensor | None, stats: Tensor, spec: NormSpec, given: bool,
) -> Tensors:  # fmt: skip
    """The first derivatives from torch ops alone, each of which can be batched over dy."""
    x = x.detach().requires_grad_()
    weight, bias, residual = (
        None if t is None else t.detach().requires_grad_() for t in (weight, bias, residual)
    )
    leaves = (x, weight, bias, residual)
    with torch.enable_grad():
        moments = (stats[0], stats[3]) if given else None
        y, _ = run_forward(reference, x, weight, bias, labels, residual, moments, spec)
    found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return tuple(None if t is None else next(found) for t in leaves)


class NormFunction(torch.autograd.Function):
    """act((x - mean) * rstd * weight[label] + bias[label] (+ residual)): y; to `tell`, statistics.

    Saves the input and the statistics; a residual only where it decides the activation's slope.
    Shapes are changed inside of it, since every view outside would be a node of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, ...)
        weight: Tensor | None,  # (C,), or (K, C)
        bias: Tensor | None,
        residual: Tensor | None,  # as x
        labels: Tensor | None,  # (N,)
        given: tuple[Tensor, Tensor] | None,  # mean and variance (evaluation)
        running: Running | None,  # statistics to move
        spec: NormSpec,
        backend: ModuleType,
        tell: bool,
    ) -> Any:
        folded = spec.activation is not None and not spec.residual_after_activation
        ctx.call = spec, backend, given is not None, folded
        y, stats = run_forward(backend, x, weight, bias, labels, residual, given, spec, running)
        ctx.save_for_backward(x, weight, bias, residual if folded else None, labels, stats)
        if not tell:
            return y
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Tensors:
        x, weight, bias, residual, labels, stats = ctx.saved_tensors
        need_dx, _, _, need_dresidual, *_ = ctx.needs_input_grad
        spec, backend, given, folded = ctx.call
        tensors = dy, x, weight, bias
        eager = not torch.compiler.is_compiling()
        if eager and torch._C._functorch.is_legacy_batchedtensor(dy):  # of is_grads_batched=True
            grads = _composed_backward(*tensors, residual, labels, stats, spec, given)
        elif torch.is_grad_enabled():
            grads = _NormBackward.apply(
                *tensors, residual, labels, stats, spec, backend, given, need_dx
            )
        else:  # nobody will differentiate this
            grads = _run_backward(backend, *tensors, labels, residual, stats, spec, given, need_dx)
        dx, dweight, dbias, dresidual = grads
        if not need_dresidual:
            dresidual = None
        elif not folded:
            dresidual = dy  # added last: its gradient is the output's, no copy
        return dx, dweight, dbias, dresidual, None, None, None, None, None, None
