"""Images pair by pair: equal to torchmetrics', and known values."""

import pytest
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from gannorm.metrics.similarity import HIGHEST, feature_distance, psnr, ssim


def images(n: int = 5, channels: int = 3, height: int = 24, width: int = 24) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, height, width, generator=g)
    return torch.nn.functional.avg_pool2d(x, 3, 1, 1) * 2 - 1


@pytest.mark.parametrize("shape", [(5, 3, 24, 24), (2, 1, 6, 6), (1, 3, 17, 40)])
def test_ssim_equals_torchmetrics(shape):
    a = images(*shape)
    for b in (a + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)), 0.5 * a):
        theirs = structural_similarity_index_measure(
            (a.double() + 1) / 2, (b.double() + 1) / 2, data_range=1.0, reduction="none"
        )
        assert torch.allclose(ssim(a, b), theirs, atol=1e-6)


def test_psnr_equals_torchmetrics_pair_by_pair():
    a = images()
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    theirs = [peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in zip(a, b, strict=True)]
    assert torch.allclose(psnr(a, b).float(), torch.stack(theirs), atol=1e-4)
    assert psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)).item() == pytest.approx(20)


def test_equal_images():
    a = images()
    assert torch.equal(psnr(a, a), torch.full((5,), HIGHEST, dtype=torch.float64))
    assert torch.allclose(ssim(a, a), torch.ones(5, dtype=torch.float64), atol=1e-9)
    assert torch.equal(feature_distance([a], [a]), torch.zeros(5, dtype=torch.float64))


def test_more_noise_is_less_alike():
    a = images()
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    found = [
        [-psnr(a, a + s * noise).mean(), -ssim(a, a + s * noise).mean(),
         feature_distance([a], [a + s * noise]).mean()]
        for s in (0.0, 0.1, 0.3, 1.0)
    ]  # fmt: skip
    for column in zip(*found, strict=True):
        assert list(column) == sorted(column) and column[0] < column[1]


def test_feature_distance_is_of_directions():
    a, b = torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    a[:, 0], b[0, 0], b[1, 1] = 3.0, 7.0, 5.0  # the same direction, a right angle
    assert feature_distance([a], [b]).tolist() == pytest.approx([0.0, 2.0])
    assert feature_distance([a, a], [b, b]).tolist() == pytest.approx([0.0, 4.0])


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="6 pixels"):
        ssim(images(width=5), images(width=5))
