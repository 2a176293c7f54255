"""Convolutions to few channels on a CPU, four rows at once.

oneDNN computes 16 output channels at once, so that 3 cost as much as 16. A kernel for each of four
rows side by side makes 12 of 3, and of a 7x7 kernel one of 10x7: 2.5 times as fast.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 4
FEW = 4  # channels that are worth it, at most


def takes(x: Tensor, weight: Tensor, padding: int, outputs: int) -> bool:
    """Whether a convolution of stride 1 to `outputs` channels is made so."""
    height = x.shape[2] + 2 * padding - weight.shape[2] + 1
    return outputs <= FEW and weight.shape[2] > 1 and height > 0 and height % ROWS == 0


def _kernels(weight: Tensor) -> Tensor:
    """(K, C, h, w) to (K * ROWS, C, h + ROWS - 1, w): the same kernel, a row further down each."""
    k, c, h, w = weight.shape
    out = weight.new_zeros((k, ROWS, c, h + ROWS - 1, w))
    for i in range(ROWS):
        out[:, i, :, i : i + h] = weight
    return out.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """The convolution (N, K, H, W), stride 1."""
    each = None if bias is None else bias.repeat_interleave(ROWS)
    y = F.conv2d(x, _kernels(weight), each, (ROWS, 1), padding)
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = len(y), len(weight), y.shape[2] * ROWS, y.shape[3]
    out = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=layout)
    out.unflatten(2, (-1, ROWS)).copy_(y.unflatten(1, (-1, ROWS)).transpose(2, 3))
    return out


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Of `forward`; weight is looked at for its shape only."""
    k, c, h, w = weight.shape
    apart = dy.unflatten(2, (-1, ROWS)).transpose(2, 3).flatten(1, 2)
    like = weight.new_empty((k * ROWS, c, h + ROWS - 1, w))
    mask = [False, True, False]
    _, dw, _ = torch.ops.aten.convolution_backward(
        apart, x, like, None, [ROWS, 1], list(padding), [1, 1], False, [0, 0], 1, mask
    )
    each = dw.unflatten(0, (k, ROWS))
    return sum(each[:, i, :, i : i + h] for i in range(1, ROWS)) + each[:, 0, :, :h]


def input_gradient(dy: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Of a convolution from few channels, stride 1: itself one to few channels."""
    h, w = weight.shape[2:]
    turned = weight.transpose(0, 1).flip(2, 3)
    return forward(dy, turned, None, (h - 1 - padding[0], w - 1 - padding[1]))
