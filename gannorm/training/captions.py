"""Grids of images with names beside their rows and above their columns."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

SMALLEST_TILE = 96  # pixels; smaller images are enlarged by a whole factor to be legible
PADDING = 4  # between images
MARGIN = 8  # around a name
LONGEST = 14  # of a name beside a row, in heights of the letters


def sheet(
    images: Tensor, columns: int, rows: Sequence[str] = (), heads: Sequence[str] = ()
) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] in rows of `columns`, as one picture (3, H', W').

    rows, heads: what is written beside the rows and above the columns; what is too long ends
        in dots.
    """
    tiles = legible(images.cpu())
    grid = make_grid(tiles, nrow=columns, padding=PADDING, pad_value=1.0)
    if not rows and not heads:
        return grid
    height, width = tiles.shape[-2:]
    size = min(max(height // 5, 12), 28)
    names = [elided(name, size, LONGEST * size) for name in rows]
    titles = [elided(name, size, width) for name in heads]
    left = max((font(size).getlength(name) for name in names), default=-2 * MARGIN)
    left, top = round(left) + 2 * MARGIN, size + 2 * MARGIN if titles else 0
    paper = Image.new("L", (left + grid.shape[2], top + grid.shape[1]), "white")
    draw = ImageDraw.Draw(paper)
    for i, name in enumerate(names):
        middle = top + PADDING + i * (height + PADDING) + height / 2
        draw.text((left - MARGIN, middle), name, "black", font(size), anchor="rm")
    for i, name in enumerate(titles):
        middle = left + PADDING + i * (width + PADDING) + width / 2
        draw.text((middle, top / 2), name, "black", font(size), anchor="mm")
    picture = torch.from_numpy(np.array(paper)).float().div(127.5).sub(1).repeat(len(grid), 1, 1)
    picture[:, top:, left:] = grid
    return picture


def legible(images: Tensor) -> Tensor:
    """Images (N, C, H, W), enlarged by a whole factor where they are small."""
    factor = max(1, SMALLEST_TILE // images.shape[-1])
    return images.float().repeat_interleave(factor, -1).repeat_interleave(factor, -2)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic letters."""
    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size
    )


def elided(name: str, size: int, width: float) -> str:
    """The name, or so much of its beginning as fits into `width` pixels, and dots.

    What cannot be shown in a line, as a folder's name may have it, is a question mark.
    """
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if font(size).getlength(name) <= width:
        return name
    while name and font(size).getlength(f"{name}…") > width:
        name = name[:-1]
    return f"{name.rstrip()}…"
