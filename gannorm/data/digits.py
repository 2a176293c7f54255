"""Embedded data: scikit-learn's 1,797 handwritten digits, alone or on photographs.

Real images that come with the package, so that every command works without a download.
"""

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from gannorm.data.digest import digest
from gannorm.data.source import Batch, Data, Source
from gannorm.schema import DigitsConfig

TEST_SHARE = 5  # every fifth digit is held out
NAMES = [str(digit) for digit in range(10)]
BRIGHT = (
    0.5  # of a patch's mean: on darker ones the digit would be light on dark, see docs/design.md
)


class _Tensors:
    """Images and labels in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch:
        return {"image": self.images[index], "label": self.labels[index]}

    def digest(self) -> str:
        return digest(self.images, self.labels)


class _OnPhotos(_Tensors):
    """|photo patch - digit|: digits (N, C, S, S) on patches cut anew for every batch.

    photos: (C, H, W) in [0, 1]. Only patches brighter than BRIGHT on average are cut.
    """

    def __init__(self, images: Tensor, labels: Tensor, photos: list[Tensor]) -> None:
        super().__init__(images, labels)
        self.photos, size = photos, images.shape[-2:]
        corners = []
        for number, photo in enumerate(photos):
            brightness = avg_pool2d(photo.mean(0, keepdim=True), tuple(size), stride=1)[0]
            places = (brightness > BRIGHT).nonzero()
            corners.append(torch.cat([torch.full((len(places), 1), number), places], 1))
        self.corners = torch.cat(corners)  # photo, top, left of every patch there is

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch:
        batch = super().fetch(index, generator)
        height, width = self.images.shape[-2:]
        chosen = torch.randint(len(self.corners), (len(index),), generator=generator)
        patches = [
            self.photos[photo][:, top : top + height, left : left + width]
            for photo, top, left in self.corners[chosen].tolist()
        ]
        digit = (batch["image"] + 1) / 2
        return {**batch, "image": (torch.stack(patches) - digit).abs() * 2 - 1}

    def digest(self) -> str:
        return digest(super().digest(), self.corners, *self.photos)


def _digit_images(cfg: DigitsConfig) -> tuple[Tensor, Tensor]:
    """All digits (1797, 1, H, W) in [-1, 1] and their labels, in a fixed random order.

    scikit-learn's own order often counts from 0 to 9: every fifth would be a 0 or a 5.
    """
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)[order] / 16
    images = interpolate(images, cfg.size, mode="bicubic", align_corners=False).clamp(0, 1)
    images = images * 2 - 1
    return images.contiguous(), torch.from_numpy(bunch.target).long()[order]


def _coloured(images: Tensor, channels: int) -> Tensor:
    return images.expand(-1, channels, -1, -1).contiguous()


def _photo_halves(cfg: DigitsConfig) -> tuple[list[Tensor], list[Tensor]]:
    """The two photographs, shrunk; their left halves to train on, their right halves held out."""
    train, test = [], []
    for photo in load_sample_images().images:
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
        if cfg.channel_pair[1] == 1:
            image = image.mean(1, keepdim=True)
        scale = max(max(cfg.size) / 64, 0.25)
        size = (int(image.shape[2] * scale), int(image.shape[3] * scale))
        image = interpolate(image, size, mode="area")[0]
        cut = image.shape[2] // 2
        train.append(image[:, :, :cut])
        test.append(image[:, :, cut:])
    return train, test


def digits(cfg: DigitsConfig) -> Data:
    """Class-conditional: handwritten digits with their labels."""
    images, labels = _digit_images(cfg)
    images = _coloured(images, cfg.channel_pair[0])
    held_out = torch.arange(len(images)) % TEST_SHARE == 0
    train = _Tensors(images[~held_out], labels[~held_out])
    test = _Tensors(images[held_out], labels[held_out])
    return Data([train], [test], [train], num_classes=10, class_names=NAMES)


def digits_m(cfg: DigitsConfig) -> Data:
    """Unpaired translation: digits (A) and other digits on photographs (B).

    The held-out digits stand in both domains: test B[i] is test A[i] on a patch of a part of the
    photographs that training never sees.
    """
    images, labels = _digit_images(cfg)
    images_a, images_b = (_coloured(images, channels) for channels in cfg.channel_pair)
    turn = torch.arange(len(images)) % TEST_SHARE
    a, b, held_out = (turn == 1) | (turn == 3), (turn == 2) | (turn == 4), turn == 0
    train_photos, test_photos = _photo_halves(cfg)
    test = _OnPhotos(images_b[held_out], labels[held_out], test_photos)
    fixed = test.fetch(list(range(len(test))), torch.Generator().manual_seed(0))
    train: list[Source] = [
        _Tensors(images_a[a], labels[a]),
        _OnPhotos(images_b[b], labels[b], train_photos),
    ]
    return Data(
        train,
        [_Tensors(images_a[held_out], labels[held_out]), _Tensors(fixed["image"], fixed["label"])],
        train,
        num_classes=10,
        counterparts=True,
        class_names=NAMES,
    )
