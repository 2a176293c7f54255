"""Reading image files of any kind into float tensors in [-1, 1]."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gannorm.errors import RequestError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm", ".gif")


def list_images(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted by name.

    Raises:
        RequestError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise RequestError(f"no images in {folder} (looked for {', '.join(EXTENSIONS)})")
    return paths


def open_image(path: Path, channels: int) -> Image.Image:
    """The image, upright, as 8-bit grey or RGB; 16-bit and float images keep their range.

    Raises:
        RequestError: a file that is no image or is damaged.
    """
    try:
        # A stream, not the name: Pillow maps files that it opens by name into memory, and
        # scrambles uncompressed TIFFs whose orientation swaps width and height.
        with path.open("rb") as stream, Image.open(stream) as file:
            kind = file.format
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"cannot read the image {path}: {error}") from error
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
    array = np.array(image, dtype=np.uint8)
    tensor = torch.from_numpy(array if array.ndim == 3 else array[..., None])
    return tensor.permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_image(tensor: Tensor) -> Image.Image:
    """A float (C, H, W) in [-1, 1] as an 8-bit image."""
    array = tensor.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    array = array.permute(1, 2, 0).squeeze(-1)
    return Image.fromarray(array.numpy())
