"""DiffAugment: what each change does, its draws, its derivatives."""

from typing import get_args

import pytest
import torch

from gannorm.schema import Augmentation
from gannorm.tasks.augment import color, cutout, diff_augment, translation

CHANGES = {"color": color, "translation": translation, "cutout": cutout}


def images(n: int = 64, channels: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_color_is_brightness_saturation_contrast():
    """Redone from the same draws with numbers of one pixel at a time."""
    x = images(4)
    y = color(x)
    torch.manual_seed(0)
    brightness, saturation, contrast = (torch.rand(4, 1, 1, 1) for _ in range(3))
    for i in range(4):
        z = x[i] + float(brightness[i]) - 0.5
        z = z.mean(0) + (z - z.mean(0)) * float(saturation[i]) * 2
        z = z.mean() + (z - z.mean()) * (float(contrast[i]) + 0.5)
        assert torch.allclose(y[i], z, atol=1e-6)
    # Its mean moves by the brightness alone, of -0.5 to 0.5.
    moved = (color(images(512, 3, 4, 4)) - images(512, 3, 4, 4)).mean((1, 2, 3))
    assert -0.5 <= moved.min() < -0.4 and 0.4 < moved.max() <= 0.5


def test_translation_moves_each_image_by_up_to_an_eighth():
    x = images(200)
    y = translation(x)
    shifts = [(down, right) for down in range(-2, 3) for right in range(-3, 4)]
    found = torch.stack([(moved(x, *shift) == y).flatten(1).all(1) for shift in shifts])
    assert (found.sum(0) == 1).all()  # each image is moved by one of them
    assert found.any(1).all()  # and all of them occur


def moved(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    height, width = x.shape[2:]
    framed = torch.nn.functional.pad(x, (3, 3, 2, 2))
    return framed[:, :, 2 - down : 2 - down + height, 3 - right : 3 - right + width]


def test_cutout_clears_one_square_of_half_the_size():
    x = images(300)
    y = cutout(x)
    cleared = y == 0
    assert torch.equal(y[~cleared], x[~cleared])
    assert torch.equal(cleared.all(1), cleared.any(1))  # of all channels
    areas = cleared[:, 0].sum((1, 2))
    rows, columns = cleared[:, 0].any(2).sum(1), cleared[:, 0].any(1).sum(1)
    assert torch.equal(areas, rows * columns)  # a rectangle
    assert rows.max() == 8 and columns.max() == 12 and (areas == 96).sum() > 30
    assert rows.min() == 4 and columns.min() == 6  # a centre on the border: half of it outside
    assert (areas > 0).all() and len(areas.unique()) > 10


@pytest.mark.parametrize("name", CHANGES)
def test_draws(name: str):
    """The same seed, the same change; only what the policy names, and another each time."""
    x = images(8)
    y = diff_augment(x, [name])
    torch.manual_seed(0)
    assert torch.equal(CHANGES[name](x), y)
    assert not torch.equal(diff_augment(x, [name]), y)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert diff_augment(x, []) is x


def test_every_name_of_the_config_is_known():
    x = images(8)
    assert set(get_args(Augmentation)) == set(CHANGES)
    assert not any(torch.equal(diff_augment(x, [each]), x) for each in get_args(Augmentation))


def test_the_policys_order_is_fixed():
    x = images(8)
    y = diff_augment(x, ["cutout", "color"])
    torch.manual_seed(0)
    assert torch.equal(diff_augment(x, ["color", "cutout"]), y) and (y == 0).any()


@pytest.mark.parametrize("policy", [["color"], ["translation"], ["cutout"], list(CHANGES)])
def test_derivatives(policy: list[str]):
    """Of first and second order: penalties differentiate through it."""

    def changed(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return diff_augment(x, policy).sin()

    x = images(2, 3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(changed, x)
    assert torch.autograd.gradgradcheck(changed, x)


def test_grey_and_one_pixel():
    for shape in ((2, 1, 8, 8), (2, 3, 1, 1)):
        assert diff_augment(torch.ones(shape), list(CHANGES)).shape == shape
