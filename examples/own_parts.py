"""A norm, a data set and a figure of one's own: an entry in a table, a function, a YAML file each.

python examples/own_parts.py model=resblock_gan norm=halves data=stripes metrics.best=mean_distance

It is `train.py` with three more choices; everything else of the command line is the same.
"""

import sys
from pathlib import Path

import torch

from gannorm import GroupNorm
from gannorm.commands.train import main
from gannorm.data import DATA, Batch, Data, DataSet
from gannorm.data.digest import digest
from gannorm.metrics.figures import FIGURES, Comparison, Figure
from gannorm.models.norm_factory import NORMS, Norm
from gannorm.schema import DataConfig, LayerNormConfig


def halves(cfg: LayerNormConfig, channels: int, num_classes: int | None, **epilogue) -> GroupNorm:
    """Group norm of two groups. The values of cfg: conf/norm/halves.yaml."""
    return GroupNorm(2, channels, eps=cfg.eps, affine=cfg.affine, **epilogue)


class Stripes:
    """Class k: k + 1 waves across the image, somewhere."""

    def __init__(self, cfg: DataConfig, count: int) -> None:
        self.size, self.channels, self.count = cfg.image_size, cfg.channels, count

    def __len__(self) -> int:
        return self.count

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch:
        labels = torch.tensor(index) % 4
        phase = torch.rand(len(index), 1, generator=generator)
        x = torch.linspace(0, 1, self.size)
        waves = torch.sin(2 * torch.pi * ((labels[:, None] + 1) * x + phase))
        images = waves[:, None, None, :].expand(-1, self.channels, self.size, -1)
        return {"image": images.contiguous(), "label": labels}

    def digest(self) -> str:
        return digest("stripes", self.size, self.channels, self.count)


def stripes(cfg: DataConfig) -> Data:
    """The values of cfg: conf/data/stripes.yaml."""
    train = Stripes(cfg, 400)
    return Data([train], [Stripes(cfg, 100)], [train], num_classes=4)


def mean_distance(sides: Comparison) -> float:
    """How far the mean features of samples and of real images are apart."""
    return float((sides.real.features.mean(0) - sides.generated.features.mean(0)).norm())


NORMS["halves"] = Norm(LayerNormConfig, halves, "sample")
DATA["stripes"] = DataSet(DataConfig, stripes, tasks=("resblock_gan",), num_classes=4)
FIGURES["mean_distance"] = Figure(mean_distance, "features")

if __name__ == "__main__":
    sys.argv += ["--config-dir", str(Path(__file__).parent / "conf")]
    main()
