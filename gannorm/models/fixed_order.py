"""torch's layers whose CUDA gradients add up in no fixed order, with one that does where asked.

`trainer.deterministic=true` (torch.use_deterministic_algorithms) has torch refuse these. Reflection
padding is ours on a GPU anyway, if there is Triton; the rest is torch's own where nobody asks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gannorm.norms.backend import HAS_TRITON
from gannorm.norms.composed import is_eager, transformed


def _asked(x: Tensor) -> bool:
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        size = self.output_size
        return pooled(x, size) if _asked(x) and isinstance(size, int) else super().forward(x)


def reflection_pad(x: Tensor, padding: tuple[int, ...]) -> Tensor:
    """x (N, C, H, W) with its mirror images around it: padding (rows, columns)."""
    rows, columns = padding
    able = x.is_cuda and x.dim() == 4 and not x.is_complex()
    if able and HAS_TRITON and is_eager(x) and not transformed():
        if min(x.shape[2] - rows, x.shape[3] - columns) > 0 and x.numel() > 0:  # else torch refuses
            from gannorm.kernels.pad import ReflectionPad

            y: Tensor = ReflectionPad.apply(x, (rows, columns))
            return y
    sides = (columns, columns, rows, rows)
    return reflected(x, sides) if _asked(x) else F.pad(x, sides, mode="reflect")


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
