"""The user's own photographs: two unpaired folders, or one folder per class."""

from pathlib import Path

import torch
from torchvision.transforms import v2

from gannorm.data.digest import digest
from gannorm.data.images import list_images, open_image, to_tensor
from gannorm.data.source import Batch, Data, Source
from gannorm.errors import RequestError
from gannorm.schema import FolderConfig


class _Files:
    """Image files, read when asked for.

    Training: resized to `load_size` square, cropped to `image_size` at random, mirrored at random
    (the reference CycleGAN's augmentation). Held-out files are resized to `image_size`.
    """

    def __init__(
        self, paths: list[Path], labels: list[int] | None, cfg: FolderConfig, augment: bool
    ) -> None:
        self.paths, self.labels, self.channels = paths, labels, cfg.channels
        self.key = (labels, cfg.channels, cfg.image_size, augment and (cfg.load_size, cfg.flip))
        steps: list[torch.nn.Module] = []
        bicubic = v2.InterpolationMode.BICUBIC
        if augment:
            steps += [v2.Resize((cfg.load_size, cfg.load_size), bicubic)]
            steps += [v2.RandomCrop(cfg.image_size)]
            steps += [v2.RandomHorizontalFlip()] if cfg.flip else []
        else:
            steps += [v2.Resize((cfg.image_size, cfg.image_size), bicubic)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch:
        with torch.random.fork_rng(devices=[]):  # torchvision draws on the global generator
            torch.default_generator.manual_seed(generator.initial_seed())
            images = [
                to_tensor(self.transform(open_image(self.paths[i], self.channels))) for i in index
            ]
        batch = {"image": torch.stack(images)}
        if self.labels is not None:
            batch["label"] = torch.tensor([self.labels[i] for i in index])
        return batch

    def digest(self) -> str:
        return digest(*self.paths, self.key)


def _check_sizes(cfg: FolderConfig) -> Path:
    if cfg.load_size < cfg.image_size:
        raise RequestError(
            f"data.load_size={cfg.load_size} is smaller than data.image_size={cfg.image_size}: "
            "images are resized to load_size, then cropped to image_size"
        )
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise RequestError(
            f"data.root={cfg.root} is not a folder; give the folder of your images with data.root="
        )
    return root


def folder_pair(cfg: FolderConfig) -> Data:
    """Unpaired translation from `root/trainA`, `root/trainB` and, if there, `testA`, `testB`."""
    root = _check_sizes(cfg)
    missing = [name for name in ("trainA", "trainB") if not (root / name).is_dir()]
    if missing:
        raise RequestError(
            f"data=folder_pair: {root} has no folder {' and no folder '.join(missing)}; it needs "
            "trainA and trainB, and testA and testB for held-out images"
        )
    train = [list_images(root / name) for name in ("trainA", "trainB")]
    plain: list[Source] = [_Files(paths, None, cfg, augment=False) for paths in train]
    test: list[Source] = [
        _Files(list_images(root / name), None, cfg, augment=False)
        if (root / name).is_dir()
        else real
        for name, real in zip(("testA", "testB"), plain, strict=True)
    ]
    domains: list[Source] = [_Files(paths, None, cfg, augment=True) for paths in train]
    return Data(domains, test, plain)


def image_folder(cfg: FolderConfig) -> Data:
    """Class-conditional: `root/<class>/...`; classes are numbered in the order of their names."""
    root = _check_sizes(cfg)
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise RequestError(
            f"data=image_folder: {root} has no folders in it; it needs one folder of images per "
            "class (a single class is one folder)"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        files = list_images(root / name)
        paths += files
        labels += [number] * len(files)
    plain = _Files(paths, labels, cfg, augment=False)
    return Data(
        [_Files(paths, labels, cfg, augment=True)], [plain], [plain], num_classes=len(classes)
    )
