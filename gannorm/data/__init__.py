"""Training data: the sets a config can name, and their batches.

A data set of one's own is an entry more: `DATA["mine"] = DataSet(config, load, tasks)`, and a file
`conf/data/mine.yaml` with the values of its config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gannorm.data.batches import batches, fetch_all
from gannorm.data.digits import digits, digits_m
from gannorm.data.folders import folder_pair, image_folder
from gannorm.data.source import Batch, Data, Source
from gannorm.data.torchvision_sets import torchvision_set
from gannorm.schema import (
    DataConfig,
    DigitsConfig,
    FolderConfig,
    ImageFolderConfig,
    TorchvisionConfig,
)

__all__ = ["DATA", "Batch", "Data", "DataSet", "Source", "batches", "build_data", "fetch_all"]


@dataclass(frozen=True)
class DataSet:
    """A data set that a config can name.

    Attributes:
        config: the class of its section.
        load: from that config to the data; raises RequestError for files that cannot be had.
        tasks: the models that it can train.
        num_classes: where it is known before the files are.
    """

    config: type[DataConfig]
    load: Callable[[Any], Data]
    tasks: tuple[str, ...]
    num_classes: int | None = None


DATA: dict[str, DataSet] = {
    "digits": DataSet(DigitsConfig, digits, ("resblock_gan",), 10),
    "digits_m": DataSet(DigitsConfig, digits_m, ("cyclegan",), 10),
    "folder_pair": DataSet(FolderConfig, folder_pair, ("cyclegan",)),
    "image_folder": DataSet(ImageFolderConfig, image_folder, ("resblock_gan",)),
    "cifar10": DataSet(TorchvisionConfig, torchvision_set, ("resblock_gan",), 10),
    "mnist": DataSet(TorchvisionConfig, torchvision_set, ("resblock_gan",), 10),
}


def build_data(cfg: DataConfig) -> Data:
    """The data set of a config's `data` section.

    Raises:
        RequestError: files that are missing or unreadable, a download that fails.
    """
    return DATA[cfg.name].load(cfg)
