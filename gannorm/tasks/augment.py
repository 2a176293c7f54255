"""DiffAugment (Zhao et al., 2020): random changes of the images that a discriminator sees.

Real and generated images pass the same policy, and the generator's gradient passes it too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gannorm.parallel import drawn


def diff_augment(images: Tensor, policy: Sequence[str], batches: int = 1) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], each changed at random; the same shape.

    policy: any of "color", "translation" and "cutout", applied in this order. Draws on torch's
        generator of the images' device. batches: that lie behind each other in `images`.
    """
    for name, change in (("color", color), ("translation", translation), ("cutout", cutout)):
        if name in policy:
            images = change(images, batches)
    return images


def _uniform(images: Tensor, batches: int, low: float, high: float) -> Tensor:
    def draw(count: int) -> Tensor:
        return torch.rand(count, 1, 1, 1, device=images.device)

    return drawn(draw, len(images), batches) * (high - low) + low


def _integers(images: Tensor, batches: int, end: int) -> Tensor:
    def draw(count: int) -> Tensor:
        return torch.randint(end, (count, 1), device=images.device)

    return drawn(draw, len(images), batches)


def color(images: Tensor, batches: int = 1) -> Tensor:
    """Brightness by -0.5 to 0.5, then saturation times 0 to 2, then contrast times 0.5 to 1.5."""
    images = images + _uniform(images, batches, -0.5, 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * _uniform(images, batches, 0, 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, batches, 0.5, 1.5)


def translation(images: Tensor, batches: int = 1) -> Tensor:
    """Moved by up to 1/8 of the size each way; 0, a middle grey, comes in at the border."""
    n, channels, *sizes = images.shape
    device, places, reaches = images.device, [], [max(1, round(size / 8)) for size in sizes]
    for size, reach in zip(sizes, reaches, strict=True):
        shift = _integers(images, batches, 2 * reach + 1)
        places.append(torch.arange(size, device=device) + shift)
    padded = pad(images, (reaches[1], reaches[1], reaches[0], reaches[0]))
    rows, columns = places[0][:, None, :, None], places[1][:, None, None, :]
    sample = torch.arange(n, device=device)[:, None, None, None]
    return padded[sample, torch.arange(channels, device=device)[:, None, None], rows, columns]


def cutout(images: Tensor, batches: int = 1) -> Tensor:
    """A square of half the size, centred anywhere in the image, set to 0."""
    inside = []
    for size in images.shape[2:]:
        cut = max(1, round(size / 2))
        first = _integers(images, batches, size + 1 - cut % 2) - cut // 2
        place = torch.arange(size, device=images.device)
        inside.append((place >= first) & (place < first + cut))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square, 0.0)
