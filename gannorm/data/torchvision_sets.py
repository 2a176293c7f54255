"""CIFAR-10 and MNIST, through torchvision, downloaded where the machine can."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import datasets

from gannorm.data.digest import digest
from gannorm.data.source import Batch, Data
from gannorm.errors import RequestError
from gannorm.schema import TorchvisionConfig

SETS = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}


class _Pixels:
    """uint8 images (N, C, S, S) in memory, mirrored at random where asked."""

    def __init__(self, images: Tensor, labels: Tensor, flip: bool) -> None:
        self.images, self.labels, self.flip = images, labels, flip

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch:
        images = self.images[index].float().div_(127.5).sub_(1)
        if self.flip:
            mirrored = torch.rand(len(index), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return {"image": images, "label": self.labels[index]}

    def digest(self) -> str:
        return digest(self.images, self.labels, self.flip)


def _load(cfg: TorchvisionConfig, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels, the names of the classes."""
    root = Path(cfg.root).expanduser()
    try:
        split = SETS[cfg.name](root, train=train, download=cfg.download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split()) or "damaged file"
        raise RequestError(
            f"data={cfg.name}: not found in {root} and not to be downloaded here ({reason}); put "
            f"torchvision's {cfg.name} files there, name another folder with data.root=, or use "
            "data=digits, which needs no download"
        ) from error
    images = torch.as_tensor(split.data)
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images.unsqueeze(1)
    channels = cfg.channel_pair[0]
    if channels != images.shape[1]:
        images = images.float().mean(1, keepdim=True).expand(-1, channels, -1, -1).byte()
    if cfg.size != images.shape[-2:]:
        images = interpolate(images.float(), cfg.size, mode="bilinear", antialias=True)
        images = images.round().byte()
    names = [name.partition(" - ")[0] for name in split.classes]  # MNIST's: "0 - zero"
    return images.contiguous(), torch.as_tensor(split.targets).long(), names


def torchvision_set(cfg: TorchvisionConfig) -> Data:
    """Class-conditional: the training split, and the test split held out."""
    images, labels, names = _load(cfg, True)
    held_out = _load(cfg, False)[:2]
    return Data(
        [_Pixels(images, labels, flip=cfg.flip)], [_Pixels(*held_out, flip=False)],
        [_Pixels(images, labels, flip=False)], num_classes=10, class_names=names,
    )  # fmt: skip
