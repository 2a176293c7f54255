"""The networks' convolution: torch's, with what surrounds it, fast on a CPU, and with second
derivatives that are convolutions of the same kind.

A penalty on a discriminator's gradient (R1, R2, WGAN-GP) differentiates twice. torch's own formula
for that takes a weight's gradient from a convolution whose kernel is a whole feature map. Here each
of the three - convolution, gradient of its input, gradient of its weight - is linear in both its
arguments, and the derivatives of any of them are the other two (as in StyleGAN3's conv2d_gradfix).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gannorm.models import narrow, winograd
from gannorm.models.fixed_order import reflection_pad
from gannorm.models.winograd import Around
from gannorm.norms.base import symbol
from gannorm.norms.composed import is_plain, recorded, transformed


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    around: Around | None = None  # what else is done; in a Function: by winograd.c

    @property
    def is_simple(self) -> bool:
        return self.groups == 1 and max(*self.stride, *self.dilation) == 1


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, how: _Geometry, gate: Tensor | None = None
) -> Tensor:
    if how.around is not None:
        return winograd.forward(x, w, bias, how.around, gate)
    with _in_full(x):
        if _is_narrow(x, w, how, w.shape[0]):
            return narrow.forward(x, w, bias, how.padding)
        return F.conv2d(x, w, bias, *how[:4])


def _in_full(x: Tensor) -> AbstractContextManager[object]:
    """Outside of autocast, in which a backward pass may stand."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _is_narrow(x: Tensor, w: Tensor, how: _Geometry, outputs: int) -> bool:
    return x.device.type == "cpu" and how.is_simple and narrow.takes(x, w, how.padding[0], outputs)


def _backward(
    dy: Tensor, x: Tensor, w: Tensor, how: _Geometry, wanted: tuple[bool, bool],
    gate: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of the input and the weight; of one, x or w is looked at for its shape."""
    if torch._C._functorch.is_legacy_batchedtensor(dy):  # of is_grads_batched=True
        return _batched_backward(dy, x, w, how, wanted, gate)
    if how.around is not None:
        return winograd.backward(dy, x, w, how.around, wanted, gate)
    dx = dw = None
    if wanted[1] and _is_narrow(x, w, how, w.shape[0]):
        dw, wanted = narrow.weight_gradient(dy, x, w, how.padding), (wanted[0], False)
    inner = w.shape[2] - 1 - how.padding[0], w.shape[3] - 1 - how.padding[1]
    if wanted[0] and min(inner) >= 0 and _is_narrow(dy, w, how._replace(padding=inner), w.shape[1]):
        with _in_full(dy):
            dx, wanted = narrow.input_gradient(dy, w, how.padding), (False, wanted[1])
    if any(wanted):
        mask = [*wanted, False]
        stride, padding, dilation, groups = how[:4]
        found = torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        dx, dw = found[0] if wanted[0] else dx, found[1] if wanted[1] else dw
    return dx, dw


def _batched_backward(
    dy: Tensor, x: Tensor, w: Tensor, how: _Geometry, wanted: tuple[bool, bool],
    gate: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """By torch's operators, which know dimensions that are not seen."""
    with torch.enable_grad():
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = _by_torch(x, how, lambda h, how: F.conv2d(h, w, None, *how[:4]), gate)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return dx if wanted[0] else None, dw if wanted[1] else None


def _by_torch(
    x: Tensor, how: _Geometry, convolve: Callable[[Tensor, _Geometry], Tensor],
    gate: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`convolve(x, how)`, with what is around it by torch's operators."""
    around = how.around or Around()
    if around.relu:
        x = F.relu(x) if gate is None else x * (gate > 0)
    if around.upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if around.reflect:
        x, how = reflection_pad(x, how.padding), how._replace(padding=(0, 0))
    y = convolve(x, how._replace(around=None))
    return F.avg_pool2d(y, 2) if around.pool else y


# `gate` is whose sign a ReLU goes by: the first convolution's input. With it given, all three are
# linear; a ReLU has no second derivative.


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, how: _Geometry, gate: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, w, gate)
        ctx.how = how
        return _forward(x, w, bias, how, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, gate = ctx.saved_tensors
        gate = x if gate is None else gate
        of_x, of_w, of_bias, *_ = ctx.needs_input_grad
        dbias = dy.sum((0, 2, 3)) if of_bias else None
        if not torch.is_grad_enabled():
            return *_backward(dy, x, w, ctx.how, (of_x, of_w), gate), dbias, None, None
        return (
            _InputGradient.apply(dy, w, ctx.how, gate) if of_x else None,
            _WeightGradient.apply(dy, x, w, ctx.how, gate) if of_w else None,
            dbias,
            None,
            None,
        )


class _InputGradient(torch.autograd.Function):
    """Of (dy, w); the gate has the input's shape and layout."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, w: Tensor, how: _Geometry, gate: Tensor) -> Tensor:
        ctx.save_for_backward(dy, w, gate)
        ctx.how = how
        dx, _ = _backward(dy, gate, w, how, (True, False))
        assert dx is not None
        return dx

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        dy, w, gate = ctx.saved_tensors
        of_dy, of_w, *_ = ctx.needs_input_grad
        return (
            _Convolution.apply(ddx, w, None, ctx.how, gate) if of_dy else None,
            _WeightGradient.apply(dy, ddx, w, ctx.how, gate) if of_w else None,
            None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """Of (dy, x); `like` has the weight's shape and layout."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, like: Tensor, how: _Geometry, gate: Tensor
    ) -> Tensor:
        ctx.save_for_backward(dy, x, gate)
        ctx.how = how
        _, dw = _backward(dy, x, like, how, (False, True), gate)
        assert dw is not None
        return dw

    @staticmethod
    def backward(ctx: Any, ddw: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, gate = ctx.saved_tensors
        of_dy, of_x, *_ = ctx.needs_input_grad
        return (
            _Convolution.apply(x, ddw, None, ctx.how, gate) if of_dy else None,
            _InputGradient.apply(dy, ddw, ctx.how, gate) if of_x else None,
            None,
            None,
            None,
        )


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`; zeros or `padding_mode="reflect"` around the input.

    Args:
        upsample: the input is upsampled to twice its height and width (nearest) before.
        relu: the input passes a ReLU before.
        pool: means of 2x2 outputs are taken behind.
        twice: second derivatives can be needed: they are this module's, on every device.
    """

    def __init__(
        self, *args: Any, upsample: bool = False, relu: bool = False, pool: bool = False,
        twice: bool = False, **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **keywords)
        if self.padding_mode not in ("zeros", "reflect"):
            raise ValueError(f"padding_mode={self.padding_mode!r}: choose zeros or reflect")
        if isinstance(self.padding, str):
            raise ValueError(f"padding={self.padding!r}: give the number of rows and columns")
        self.upsample, self.relu, self.pool, self.twice = upsample, relu, pool, twice

    def extra_repr(self) -> str:
        around = "upsample", "relu", "pool"
        more = [f"{name}=True" for name in around if getattr(self, name)]
        return ", ".join([super().extra_repr(), *more])

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            traced: Tensor = symbol(self, input)
            return traced
        return super().forward(input)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = input, self.padding
        assert not isinstance(padding, str)
        around = Around(self.padding_mode == "reflect", self.upsample, self.relu, self.pool)
        how = _Geometry(self.stride, padding, self.dilation, self.groups, around)
        ours = _is_ours(x)
        simple = ours and x.device.type == "cpu" and how.is_simple
        if simple and padding == (1, 1) and winograd.takes(x, weight, bias, around):
            return _convolved(x, weight, bias, how)
        if ours and self.twice or simple and min(weight.shape[:2]) <= narrow.FEW:
            return _by_torch(x, how, lambda h, how: _convolved(h, weight, bias, how))
        return _by_torch(x, how, lambda h, how: F.conv2d(h, weight, bias, *how[:4]))


def _is_ours(x: Tensor) -> bool:
    """Whether x is convolved eagerly, in its own dtype; else torch does it, where all can see."""
    return not (
        torch.compiler.is_compiling()
        or recorded()
        or transformed()
        or x.device.type not in ("cpu", "cuda")
        or torch.is_autocast_enabled(x.device.type)
        or x.dim() != 4
        or x.is_complex()
        or not is_plain(x)
    )


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, how: _Geometry) -> Tensor:
    if not torch.is_grad_enabled():
        return _forward(x, weight, bias, how)
    y: Tensor = _Convolution.apply(x, weight, bias, how, None)
    return y
