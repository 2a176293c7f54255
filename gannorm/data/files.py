"""Image files as a source of training data: scaled, cropped, mirrored."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gannorm.data.digest import digest
from gannorm.data.images import open_image
from gannorm.data.preflight import Checked
from gannorm.data.source import Batch
from gannorm.schema import FolderConfig

MULTIPLE = 4  # of which the sides of an image are that is neither scaled nor cropped


def scaled_size(size: tuple[int, int], cfg: FolderConfig) -> tuple[int, int]:
    """Height and width of an image of `size` before it is cropped."""
    (height, width), (load_height, load_width) = size, cfg.load
    if cfg.preprocess == "resize_and_crop":
        return load_height, load_width
    if cfg.preprocess == "scale_width_and_crop":
        return max(1, round(height * load_width / width)), load_width
    if cfg.preprocess == "scale_shortside_and_crop":
        short = min(load_height, load_width) / min(height, width)
        return round(height * short), round(width * short)
    if cfg.preprocess == "none":
        height, width = (max(MULTIPLE, round(s / MULTIPLE) * MULTIPLE) for s in size)
    return height, width


def too_small(size: tuple[int, int], cfg: FolderConfig) -> str:
    """Why an image of `size` cannot be cropped to image_size, or nothing."""
    (height, width), scaled = cfg.size, scaled_size(size, cfg)
    if cfg.preprocess == "none" or (scaled[0] >= height and scaled[1] >= width):
        return ""
    becomes = "" if scaled == size else f", {scaled[0]}x{scaled[1]} once scaled"
    return (
        f"{size[0]}x{size[1]} pixels{becomes}: too small for a crop of {height}x{width} "
        f"(data.preprocess={cfg.preprocess})"
    )


class Files:
    """Image files, read when asked for, or their pixels, kept scaled in one file.

    files: what is known of them; pixels: their scaled pixels, where they are kept.
    augment: cropped to `image_size` and mirrored at random. Else the crop is the middle one; with
        resize_and_crop and none the whole image is resized to `image_size` instead.
    """

    def __init__(
        self, files: list[Checked], labels: list[int] | None, cfg: FolderConfig, channels: int,
        augment: bool, pixels: "Pixels | None" = None,
    ) -> None:  # fmt: skip
        self.files, self.labels, self.cfg = files, labels, cfg
        self.channels, self.augment, self.pixels = channels, augment, pixels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return str(self.files[i].path)

    @property
    def whole(self) -> bool:
        """Whether images are resized to `image_size` at once."""
        return not self.augment and self.cfg.preprocess in ("resize_and_crop", "none")

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch:
        return self.fetch_part(index, generator, slice(None))

    def fetch_part(self, index: list[int], generator: torch.Generator, own: slice) -> Batch:
        """The images `own` of `fetch`; the others are drawn for and not read."""
        crops = [self._crop(i, generator) for i in index]
        images = np.stack(list(map(self._image, index[own], crops[own])))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        batch = {"image": pixels.contiguous().float().div_(127.5).sub_(1)}
        if self.labels is not None:
            batch["label"] = torch.tensor([self.labels[i] for i in index[own]])
        return batch

    def _crop(self, i: int, generator: torch.Generator) -> tuple[int, int, bool]:
        """Top, left, and whether it is mirrored."""
        cfg, top, left = self.cfg, 0, 0
        if cfg.preprocess != "none" and not self.whole:
            sizes = zip(scaled_size(self.files[i].size, cfg), cfg.size, strict=True)
            rooms = [scaled - size for scaled, size in sizes]
            top, left = (room // 2 for room in rooms)
            if self.augment:
                top, left = (
                    int(torch.randint(room + 1, (), generator=generator)) for room in rooms
                )
        mirrored = self.augment and cfg.flip and torch.rand((), generator=generator) < 0.5
        return top, left, bool(mirrored)

    def _image(self, i: int, crop: tuple[int, int, bool]) -> np.ndarray:
        """uint8 (H, W, C), a view where the pixels are kept."""
        cfg, file, (top, left, mirrored) = self.cfg, self.files[i], crop
        if self.whole:
            return scaled(file.path, self.channels, cfg.size)
        image = None if self.pixels is None else self.pixels.read(i)
        if image is None:
            image = scaled(file.path, self.channels, scaled_size(file.size, cfg))
        if cfg.preprocess != "none":
            height, width = cfg.size
            image = image[top : top + height, left : left + width]
        return image[:, ::-1] if mirrored else image

    def digest(self) -> str:
        cfg = self.cfg
        recipe = (cfg.size, cfg.preprocess, cfg.load, self.augment and cfg.flip, self.channels)
        return digest(*(f.content for f in self.files), self.labels, self.whole, recipe)


def scaled(path: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    """The image as uint8 (H, W, C), bicubic with antialiasing.

    Raises:
        RequestError: a file that can no longer be read.
    """
    image = open_image(path, channels)
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).reshape(*size, channels)


class Pixels:
    """uint8 images (H, W, C) behind each other in a file, mapped into memory when first read."""

    def __init__(self, path: Path, shapes: list[tuple[int, int, int]]) -> None:
        self.path, self.shapes = path, shapes
        ends = np.cumsum([h * w * c for h, w, c in shapes])
        self.starts = np.concatenate([[0], ends[:-1]])
        self.total = int(ends[-1])
        self.memory: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"memory": None}  # a worker maps the file itself

    def read(self, i: int) -> np.ndarray | None:
        """Image i, uint8 (H, W, C); None where the file has gone."""
        if self.memory is None:
            try:
                self.memory = np.memmap(self.path, np.uint8, "r", shape=(self.total,))
            except (OSError, ValueError):
                return None
        h, w, c = self.shapes[i]
        start = int(self.starts[i])
        return self.memory[start : start + h * w * c].reshape(h, w, c)
