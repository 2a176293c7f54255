"""A convolution whose second derivatives are convolutions of the same kind.

A penalty on a discriminator's gradient (R1, R2, WGAN-GP) differentiates twice. torch's own formula
for that takes a weight's gradient from a convolution whose kernel is a whole feature map. Here each
of the three - convolution, gradient of its input, gradient of its weight - is linear in both its
arguments, and the derivatives of any of them are the other two (as in StyleGAN3's conv2d_gradfix).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gannorm.norms.composed import transformed


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _backward(dy: Tensor, x: Tensor, w: Tensor, how: _Geometry, wanted: int) -> Tensor:
    """The gradient of the input (`wanted` 0) or the weight (1)."""
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        dy, x, w, None, how.stride, how.padding, how.dilation, False, [0, 0], how.groups, mask
    )[wanted]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, how: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = how
        return F.conv2d(x, w, bias, *how)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias, _ = ctx.needs_input_grad
        return (
            _InputGradient.apply(dy, w, x, ctx.how) if of_x else None,
            _WeightGradient.apply(dy, x, w, ctx.how) if of_w else None,
            dy.sum((0, 2, 3)) if of_bias else None,
            None,
        )


class _InputGradient(torch.autograd.Function):
    """Of (dy, w); `like` has the input's shape and layout."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, w: Tensor, like: Tensor, how: _Geometry) -> Tensor:
        ctx.save_for_backward(dy, w)
        ctx.how = how
        return _backward(dy, like, w, how, 0)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        dy, w = ctx.saved_tensors
        of_dy, of_w, *_ = ctx.needs_input_grad
        return (
            _Convolution.apply(ddx, w, None, ctx.how) if of_dy else None,
            _WeightGradient.apply(dy, ddx, w, ctx.how) if of_w else None,
            None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """Of (dy, x); `like` has the weight's shape and layout."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, like: Tensor, how: _Geometry) -> Tensor:
        ctx.save_for_backward(dy, x)
        ctx.how = how
        return _backward(dy, x, like, how, 1)

    @staticmethod
    def backward(ctx: Any, ddw: Tensor) -> tuple[Tensor | None, ...]:
        dy, x = ctx.saved_tensors
        of_dy, of_x, *_ = ctx.needs_input_grad
        return (
            _Convolution.apply(x, ddw, None, ctx.how) if of_dy else None,
            _InputGradient.apply(dy, ddw, x, ctx.how) if of_x else None,
            None,
            None,
        )


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, with the second derivatives of this module where they can be needed."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = (
            torch.compiler.is_compiling()
            or transformed()
            or input.device.type not in ("cpu", "cuda")
            or torch.is_autocast_enabled(input.device.type)
            or isinstance(self.padding, str)
            or self.padding_mode != "zeros"
            or input.dim() != 4
            or input.is_complex()
        )
        if plain:
            return super()._conv_forward(input, weight, bias)
        assert not isinstance(self.padding, str)
        how = _Geometry(self.stride, self.padding, self.dilation, self.groups)
        y: Tensor = _Convolution.apply(input, weight, bias, how)
        return y
