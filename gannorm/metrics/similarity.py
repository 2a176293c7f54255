"""How close images (N, C, H, W) in [-1, 1] are to others, pair by pair; the mean of the pairs."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

SMALLEST = 6  # pixels that SSIM's window of 11 has to reflect
HIGHEST = 100.0  # dB that equal images get, instead of infinity


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, each pair's (N,), at most HIGHEST."""
    values = peak_signal_noise_ratio(
        images.double(), target.double(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=HIGHEST)


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004), each pair's (N,), in [-1, 1].

    Over windows of 11 pixels, Gaussian of width 1.5, around every pixel, the image reflected at
    its border, as in torchmetrics. A product with a banded matrix from each side: in float64 on a
    CPU many times faster than a convolution.

    Raises:
        ValueError: images of fewer than 6 pixels, which have nothing to reflect.
    """
    if min(images.shape[-2:]) < SMALLEST:
        raise ValueError(f"ssim needs images of {SMALLEST} pixels or more, not {images.shape[-2:]}")
    x, y = ((side.double() + 1) / 2 for side in (images, target))
    rows, columns = (_windows(size).to(x.device) for size in images.shape[-2:])
    maps = torch.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = rows @ (maps @ columns.mT)
    c1, c2 = 0.01**2, 0.03**2
    means = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    variances = xx - mean_x.square() + yy - mean_y.square()
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (variances + c2)
    return (means * contrast).mean((1, 2, 3))


def _windows(size: int) -> Tensor:
    """The Gaussian window around each of `size` pixels, the reflected ones counted in: square."""
    reach = SMALLEST - 1
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = (-offsets.square() / (2 * 1.5**2)).exp()
    # Row p of the padded identity says to which pixels the padded image's pixels belong.
    padded = torch.nn.functional.pad(
        torch.eye(size, dtype=torch.float64)[None], (reach, reach), mode="reflect"
    )[0]
    return (padded.unfold(1, 2 * reach + 1, 1) @ (weights / weights.sum())).mT


def feature_distance(maps: list[Tensor], target: list[Tensor]) -> Tensor:
    """LPIPS (Zhang et al., 2018) without its learned weights, each pair's (N,).

    maps: a network's activations (N, C, H, W), layer by layer. Each pixel's are scaled to length
    1; the squared distances are averaged over the pixels and summed over the layers.
    """
    total = torch.zeros(len(maps[0]), dtype=torch.float64, device=maps[0].device)
    for a, b in zip(maps, target, strict=True):
        a, b = (x.to(torch.float64, copy=True) for x in (a, b))  # and in place from here on
        lengths = a.square().sum(1).sqrt() + 1e-10, b.square().sum(1).sqrt() + 1e-10
        a, b = (x.div_(length[:, None]) for x, length in zip((a, b), lengths, strict=True))
        total += a.sub_(b).square_().sum(1).mean((1, 2))
    return total
