"""One autograd Function for every norm and both backends, differentiable any number of times.

First order: a launcher (Triton) or its torch twin. Second order: the gradient is differentiated
through `reference.forward`, a composition of torch ops in which the statistics depend on the
input. Saving mean and variance as constants, or calling a raw kernel under `create_graph=True`,
would be silently wrong.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gannorm import reference
from gannorm.reference import NormSpec

Tensors = tuple[Tensor | None, ...]


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
        mean: Tensor,
        var: Tensor,
        spec: NormSpec,
        backend: ModuleType,
        given_stats: bool,
        need_dx: bool,
    ) -> Tensors:
        ctx.save_for_backward(dy, x, weight, bias, residual, labels, mean, var)
        ctx.spec, ctx.given_stats = spec, given_stats
        ctx.set_materialize_grads(False)
        dx, dweight, dbias, g = backend.backward(
            dy, x, weight, bias, labels, residual, mean, var, spec, given_stats, need_dx
        )
        return dx, dweight, dbias, None if residual is None else g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        if all(g is None for g in grads):
            return (None,) * 12
        *leaves, labels, mean, var = ctx.saved_tensors
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
            if not ctx.given_stats:
                mean = var = None
            y, _, _ = reference.forward(x, weight, bias, labels, residual, mean, var, ctx.spec)
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
        return *(None if t is None else next(found) for t in twins), *([None] * 7)


class NormFunction(torch.autograd.Function):
    """act((x - mean) * rstd * weight[label] + bias[label] (+ residual)): y, mean, variance.

    Saves the input and the statistics; a residual only where it decides the activation's slope.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, S), contiguous along S
        weight: Tensor | None,  # (K, C)
        bias: Tensor | None,
        residual: Tensor | None,  # (N, C, S), contiguous, x's dtype
        labels: Tensor | None,  # (N,)
        mean: Tensor | None,  # given statistics (evaluation), or None: the batch's own
        var: Tensor | None,
        spec: NormSpec,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.spec, ctx.backend, ctx.given_stats = spec, backend, mean is not None
        ctx.folded = spec.activation is not None and not spec.residual_after_activation
        y, mean, var = backend.forward(x, weight, bias, labels, residual, mean, var, spec)
        ctx.save_for_backward(x, weight, bias, residual if ctx.folded else None, labels, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Tensors:
        x, weight, bias, residual, labels, mean, var = ctx.saved_tensors
        need_dx, need_dresidual = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        dx, dweight, dbias, dresidual = _NormBackward.apply(
            dy.contiguous(), x, weight, bias, residual, labels, mean, var,
            ctx.spec, ctx.backend, ctx.given_stats, need_dx,
        )  # fmt: skip
        if need_dresidual and not ctx.folded:
            dresidual = dy  # added last: its gradient is the output's, no copy
        return dx, dweight, dbias, dresidual, *([None] * 5)
