"""torch's layers whose CUDA gradients add up in no fixed order, with one that does where asked.

`trainer.deterministic=true` (torch.use_deterministic_algorithms) has torch refuse these. Elsewhere
they are torch's own.
"""

import torch
from torch import Tensor, nn


def _asked(x: Tensor) -> bool:
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()


class ReflectionPad2d(nn.ReflectionPad2d):
    def forward(self, x: Tensor) -> Tensor:
        return reflected(x, self.padding) if _asked(x) else super().forward(x)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        size = self.output_size
        return pooled(x, size) if _asked(x) and isinstance(size, int) else super().forward(x)


def reflected(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """x (N, C, H, W) with its mirror images (left, right, top, bottom) around it."""
    for dim, (before, after) in ((-1, padding[:2]), (-2, padding[2:])):
        end = x.shape[dim] - 1
        first = x.narrow(dim, 1, before).flip(dim)
        last = x.narrow(dim, end - after, after).flip(dim)
        x = torch.cat([first, x, last], dim)
    return x


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of x (N, C, H, W) over size x size windows as torch's: two products of matrices."""
    rows, columns = (_shares(length, size).to(x) for length in x.shape[-2:])
    return rows @ x @ columns.mT


def _shares(length: int, size: int) -> Tensor:
    """(size, length): what each place has in each window's mean; windows may overlap."""
    place, window = torch.arange(length), torch.arange(size)[:, None]
    first, end = window * length // size, -((window + 1) * -length // size)
    inside = (place >= first) & (place < end)
    return inside / inside.sum(1, keepdim=True)
