"""Where the elements of a norm's tensors lie: what a kernel can have as it is, what is copied."""

import math
from typing import Any

import torch
from torch import Tensor


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a dense x (N, C, ...): channels_last where x is, else contiguous."""
    n, c, *plane = x.shape
    size = math.prod(plane)
    inner = [math.prod(plane[k + 1 :]) for k in range(len(plane))]
    last = (size * c, 1, *(c * each for each in inner))
    if size > 1 and c > 1 and same_places(x.shape, x.stride(), last):
        return last
    return (c * size, size, *inner)


def same_places(shape: Any, a: Any, b: Any) -> bool:
    """Whether strides `a` and `b` mean the same places."""
    return all(p == q or size == 1 for size, p, q in zip(shape, a, b, strict=True))


def flat_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of x (N, C, ...) as (N, C, S), if its planes are dense or it is channels_last."""
    n, c, *plane = x.shape
    dense = dense_strides(x)
    if same_places(x.shape, x.stride(), dense):
        return dense[0], dense[1], dense[-1] if plane else 1
    inner = zip(plane, x.stride()[2:], dense[2:], strict=True)
    if all(p == q or size == 1 for size, p, q in inner):
        return x.stride(0), x.stride(1), 1
    return None


def placed(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`t` with its values in memory, in these strides."""
    if t.is_neg() or not t.data_ptr():  # of an imaginary part; zeros of autograd's
        t = t + torch.zeros((), dtype=t.dtype, device=t.device)
    if same_places(t.shape, t.stride(), stride):
        return t
    return t.new_empty_strided(t.shape, stride).copy_(t)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def is_ready(t: Tensor | None) -> bool:
    """Whether a kernel can have `t`, a vector or a table, as it is."""
    return t is None or (t.is_contiguous() and not t.is_neg())
