"""Reading image files of any kind into float tensors in [-1, 1]."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gannorm.errors import RequestError

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm",
    ".gif",
)  # fmt: skip


def list_images(folder: Path, endings: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """All image files below `folder`, sorted by name; links are followed, hidden names left out.

    endings: in lower case, of what else is looked for.

    Raises:
        RequestError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}")
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        # A link back up would lead round in a circle.
        folders[:] = [] if real in seen else sorted(n for n in folders if n[0] != ".")
        names = [] if real in seen else names
        seen.add(real)
        paths += [
            path
            for path in (Path(parent, name) for name in names if not name.startswith("."))
            if path.suffix.lower() in endings and (path.is_file() or path.is_symlink())
        ]
    if not paths:
        raise RequestError(f"no images in {folder} (looked for {', '.join(endings)})")
    return sorted(paths)


def open_image(path: Path, channels: int) -> Image.Image:
    """The image, upright, as 8-bit grey or RGB; 16-bit and float images keep their range.

    Raises:
        RequestError: a file that is no image or is damaged.
    """
    try:
        # A stream, not the name: Pillow maps files that it opens by name into memory, and
        # scrambles uncompressed TIFFs whose orientation swaps width and height.
        with path.open("rb") as stream:
            return read_image(stream, channels)
    except Exception as error:  # a damaged file leads Pillow's readers to errors of any kind
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise RequestError(f"cannot read the image {path}: {reason}") from error


def read_image(stream: BinaryIO, channels: int) -> Image.Image:
    """As `open_image`, which answers for the errors."""
    with Image.open(stream) as file:
        kind = file.format
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips these at 255
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files span 0..65535; 32-bit and float ones have no fixed white, take theirs.
        sixteen = "16" in image.mode or kind in ("PNG", "PPM")  # which Pillow widens to 32 bits
        low, high = (0.0, 65535.0) if sixteen else (values.min(), values.max())
        scaled = (values - low) / max(high - low, 1e-12) * 255
        image = Image.fromarray(scaled.round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:  # on white, as viewers show it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An 8-bit image as float32 (C, H, W) in [-1, 1]."""
    return to_levels(image).float().div_(127.5).sub_(1)


def to_levels(image: Image.Image) -> Tensor:
    """An 8-bit image as uint8 (C, H, W)."""
    array = np.array(image, dtype=np.uint8)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def to_image(tensor: Tensor) -> Image.Image:
    """A float (C, H, W) in [-1, 1] as an 8-bit image."""
    return to_picture(rounded(tensor))


def rounded(values: Tensor) -> Tensor:
    """Values in [-1, 1] as 8-bit levels, on the CPU."""
    return values.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().byte().cpu()


def to_picture(levels: Tensor) -> Image.Image:
    """uint8 (C, H, W) as an image."""
    return Image.fromarray(levels.permute(1, 2, 0).squeeze(-1).numpy())
