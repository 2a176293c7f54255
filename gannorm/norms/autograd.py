"""One autograd Function for every norm and all backends, differentiable any number of times.

First order: the backend's own code. Second order: the gradient is differentiated through
`composed.forward`, a composition of torch ops in which the statistics depend on the input. Saving
mean and variance as constants, or calling a raw kernel under `create_graph=True`, would be
silently wrong.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gannorm.norms import composed, sync
from gannorm.norms.composed import NormSpec

Tensors = tuple[Tensor | None, ...]
Moments = tuple[Tensor | None, Tensor | None, float]


class Call(NamedTuple):
    """A norm on tensors of one kind: all that is decided before their values are looked at.

    Tensors have torch's shapes: x and residual (N, C, ...), weight and bias (C,) or (K, C).
    `moments` are the mean and variance (C,) that are given, or the running ones and the share by
    which these move.
    """

    spec: NormSpec
    backend: ModuleType  # kernels, cpu or composed
    launches: Any = None  # those of the kernels, where they are the backend
    given: bool = False
    running: bool = False
    bessel: float = 1.0  # from the biased variance to the running one
    folded: bool = False  # the residual decides the activation's slope
    check_labels: bool = False  # before their rows are looked up
    return_stats: bool = False  # the statistics too: compiled code moves the running ones outside
    portable: bool = False  # by torch's own operators
    biased: bool = False  # the running variance
    sync: Any = None  # what runs it with other processes, `sync.Synced`

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
        residual: Tensor | None, moments: Moments,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y and the statistics; moves the running ones."""
        mean, var, momentum = moments
        if self.launches is not None:
            y, stats = self.launches.forward(
                x, weight, bias, labels, residual, mean, var, (float(momentum), self.bessel)
            )
            if self.running and not self.launches.moves:
                composed.update_running((mean, var, momentum, self.bessel), stats)
            return y, stats
        if self.sync is not None:
            return self.sync.forward(x, weight, bias, labels, residual, moments)
        given = (mean, var) if self.given else None
        running = (
            (mean, var, momentum, self.bessel) if self.running and not self.return_stats else None
        )
        return self.backend.forward(x, weight, bias, labels, residual, given, self.spec, running)

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        labels: Tensor | None, residual: Tensor | None, stats: Tensor, need_dx: bool,
    ) -> Tensors:  # fmt: skip
        """dx, dweight, dbias and, where the residual was given, its gradient."""
        if self.launches is not None:
            return self.launches.backward(dy, x, weight, bias, labels, residual, stats, need_dx)
        if self.sync is not None and need_dx:
            return self.sync.backward(dy, x, weight, bias, labels, residual, stats)
        return self.backend.backward(
            dy, x, weight, bias, labels, residual, stats, self.spec, self.given, need_dx
        )


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
        call: Call,
        need_dx: bool,
    ) -> Tensors:
        ctx.save_for_backward(dy, x, weight, bias, residual, labels, stats)
        ctx.call = call
        # With others even zeros are differentiated: they may have more, and wait.
        ctx.set_materialize_grads(call.sync is not None)
        dx, dweight, dbias, g = call.backward(dy, x, weight, bias, labels, residual, stats, need_dx)
        return dx, dweight, dbias, None if residual is None else g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        if all(g is None for g in grads):
            return (None,) * 9
        *leaves, labels, stats = ctx.saved_tensors
        call, third_order = ctx.call, torch.is_grad_enabled()
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
            if call.sync is not None:
                y = call.sync.composition(x, weight, bias, labels, residual, stats)
            else:
                given = (stats[0], stats[3]) if call.given else None
                y, _ = composed.forward(x, weight, bias, labels, residual, given, call.spec)
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
        grads_of = iter(second)
        return *(None if t is None else next(grads_of) for t in twins), *([None] * 4)


def _composed_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, call: Call,
) -> Tensors:  # fmt: skip
    """The first derivatives from torch ops alone, each of which can be batched over dy."""
    if call.sync is not None:
        raise RuntimeError(sync.ALONE)
    x = x.detach().requires_grad_()
    weight, bias, residual = (
        None if t is None else t.detach().requires_grad_() for t in (weight, bias, residual)
    )
    leaves = (x, weight, bias, residual)
    with torch.enable_grad():
        given = (stats[0], stats[3]) if call.given else None
        y, _ = composed.forward(x, weight, bias, labels, residual, given, call.spec)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return tuple(None if t is None else next(grads) for t in leaves)


class NormFunction(torch.autograd.Function):
    """act((x - mean) * rstd * weight[label] + bias[label] (+ residual)), and the statistics where
    they are to be returned.

    Saves the input and the statistics; a residual only where it decides the activation's slope.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        labels: Tensor | None,
        moments: Moments,
        call: Call,
    ) -> Any:
        ctx.call = call
        y, stats = call.forward(x, weight, bias, labels, residual, moments)
        ctx.save_for_backward(x, weight, bias, labels, residual if call.folded else None, stats)
        if not call.return_stats:
            return y
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Tensors:
        x, weight, bias, labels, residual, stats = ctx.saved_tensors
        need_dx, _, _, need_dresidual, *_ = ctx.needs_input_grad
        call = ctx.call
        eager = not torch.compiler.is_compiling()
        if eager and torch._C._functorch.is_legacy_batchedtensor(dy):  # of is_grads_batched=True
            grads = _composed_backward(dy, x, weight, bias, labels, residual, stats, call)
        elif torch.is_grad_enabled():
            grads = _NormBackward.apply(dy, x, weight, bias, residual, labels, stats, call, need_dx)
        else:  # nobody will differentiate this
            grads = call.backward(dy, x, weight, bias, labels, residual, stats, need_dx)
        dx, dweight, dbias, dresidual = grads
        if not need_dresidual:
            dresidual = None
        elif not call.folded:
            dresidual = dy  # added last: its gradient is the output's, no copy
        return dx, dweight, dbias, dresidual, None, None, None
