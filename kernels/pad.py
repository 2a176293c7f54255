"""Reflection padding in the layout of its input, contiguous or channels_last.

torch's on a GPU answers channels_last with a contiguous tensor, which the convolution behind it
turns back; and its gradient adds up in no fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gannorm.kernels.layout import dense_strides, placed

BLOCK = 1024  # elements of a program


@triton.jit
def _place(i, H, W, C, LAST: tl.constexpr):
    """Sample, channel, row and column of element i, in the order of memory."""
    if LAST:
        c, rest = i % C, i // C
        w, rest = rest % W, rest // W
        h, n = rest % H, rest // H
    else:
        w, rest = i % W, i // W
        h, rest = rest % H, rest // H
        c, n = rest % C, rest // C
    return n, c, h, w


@triton.jit
def _mirrored(i, size):
    """Which of `size` elements stands at place i around them."""
    i = tl.abs(i)
    return tl.where(i < size, i, 2 * size - 2 - i)


@triton.jit
def pad_kernel(
    x_ptr, y_ptr, total, H, W, C, ROWS, COLUMNS, xn, xc, xh, xw,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, c, h, w = _place(i, H + 2 * ROWS, W + 2 * COLUMNS, C, LAST)
    from_h, from_w = _mirrored(h - ROWS, H), _mirrored(w - COLUMNS, W)
    x = tl.load(x_ptr + n * xn + c * xc + from_h * xh + from_w * xw, mask=i < total)
    tl.store(y_ptr + i, x, mask=i < total)


@triton.jit
def _copy_of(h, size, pad, WHICH: tl.constexpr):
    """Where element h of `size` stands in the padded side, itself (0) or mirrored (1: before it,
    2: behind it), and whether it does."""
    if WHICH == 0:
        return h + pad, h >= 0
    if WHICH == 1:
        return pad - h, (h >= 1) & (h <= pad)
    return 2 * size - 2 - h + pad, (h <= size - 2) & (h >= size - 1 - pad)


@triton.jit
def pad_backward_kernel(
    dy_ptr, dx_ptr, total, H, W, C, ROWS, COLUMNS, yn, yc, yh, yw,
    LAST: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, c, h, w = _place(i, H, W, C, LAST)
    base = dy_ptr + n * yn + c * yc
    total_gradient = tl.zeros([BLOCK], tl.float64 if DOUBLE else tl.float32)
    for row in tl.static_range(3):
        at_h, is_h = _copy_of(h, H, ROWS, row)
        for column in tl.static_range(3):
            at_w, is_w = _copy_of(w, W, COLUMNS, column)
            there = (i < total) & is_h & is_w
            dy = tl.load(base + at_h * yh + at_w * yw, mask=there, other=0)
            total_gradient += dy.to(total_gradient.dtype)
    tl.store(dx_ptr + i, total_gradient.to(dx_ptr.dtype.element_ty), mask=i < total)


def _launch(
    kernel: Any, source: Tensor, shape: tuple[int, ...], size: tuple[int, ...], *more: Any
) -> Tensor:
    """What the kernel makes of `source`, in its layout; size: of the unpadded rows and columns, and
    of the padding."""
    strides = dense_strides(source)
    source, last = placed(source, strides), strides[1] == 1 and source.shape[1] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    to = torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=layout)
    total, (h, w, rows, columns) = to.numel(), size
    with torch.cuda.device_of(to):
        kernel[(triton.cdiv(total, BLOCK),)](
            source, to, total, h, w, shape[1], rows, columns, *strides, last, *more, BLOCK
        )
    return to


def forward(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """x (N, C, H, W) with its mirror images around it: padding (rows, columns), below (H, W)."""
    n, c, h, w = x.shape
    rows, columns = padding
    return _launch(pad_kernel, x, (n, c, h + 2 * rows, w + 2 * columns), (h, w, rows, columns))


def backward(dy: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of `forward`'s x."""
    n, c, h, w = dy.shape
    rows, columns = padding
    h, w = h - 2 * rows, w - 2 * columns
    double = dy.dtype == torch.float64
    return _launch(pad_backward_kernel, dy, (n, c, h, w), (h, w, rows, columns), double)


class ReflectionPad(torch.autograd.Function):
    """Linear: the gradient's own is the padding again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.padding = padding
        return forward(x, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _PadGradient.apply(dy, ctx.padding), None


class _PadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, padding: tuple[int, int]) -> Tensor:
        ctx.padding = padding
        return backward(dy, padding)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None]:
        return ReflectionPad.apply(ddx, ctx.padding), None
