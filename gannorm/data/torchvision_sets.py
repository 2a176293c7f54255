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


def _load(cfg: TorchvisionConfig, train: bool) -> tuple[Tensor, Tensor]:
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
    if cfg.channels != images.shape[1]:
        images = images.float().mean(1, keepdim=True).expand(-1, cfg.channels, -1, -1).byte()
    if cfg.image_size != images.shape[-1]:
        size = (cfg.image_size, cfg.image_size)
        images = interpolate(images.float(), size, mode="bilinear", antialias=True)
        images = images.round().byte()
    return images.contiguous(), torch.as_tensor(split.targets).long()


def torchvision_set(cfg: TorchvisionConfig) -> Data:
    """Class-conditional: the training split, and the test split held out."""
    train, test = _load(cfg, True), _load(cfg, False)
    return Data(
        [_Pixels(*train, flip=cfg.flip)], [_Pixels(*test, flip=False)],
        [_Pixels(*train, flip=False)], num_classes=10,
    )  # fmt: skip
