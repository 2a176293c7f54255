"""What `translate` reads and writes: which files, at which size, as 8-bit levels."""

import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from gannorm.commands import video
from gannorm.data.images import EXTENSIONS, list_images
from gannorm.errors import RequestError


def find_sources(source: Path, target: Path) -> dict[Path, Path]:
    """What to translate, by the file it becomes: the images and videos below the folder `source`,
    or that one file.

    Raises:
        RequestError: nothing there, two that would get the same name, or a translation that would
            overwrite one of them or be found as one.
    """
    known = EXTENSIONS + video.EXTENSIONS
    if source.is_file():
        if source.suffix.lower() not in known:
            raise RequestError(f"{source} is no image or video ({', '.join(known)})")
        root, paths = source.parent, [source]
    else:
        root, paths = source, list_images(source, known)
        if source.resolve() in (target.resolve(), *target.resolve().parents):
            raise RequestError(
                f"{target} lies in {source}: its images would be overwritten or translated again; "
                "choose another folder for the translations"
            )
    originals = {p.resolve() for p in paths}
    found: dict[Path, Path] = {}
    for p in paths:
        kind = ".mp4" if is_video(p) else ".png"
        written = target / p.relative_to(root).with_suffix(kind)
        if written in found:
            raise RequestError(
                f"{found[written]} and {p} would both become {written}; rename one of them"
            )
        if written.resolve() in originals:
            raise RequestError(
                f"{written} would be overwritten; choose another folder for the translations"
            )
        found[written] = p
    return found


def is_video(path: Path) -> bool:
    return path.suffix.lower() in video.EXTENSIONS


def parse_size(text: str, train: tuple[int, int]) -> list[int] | None:
    """`--size` as torchvision's resize takes it: [shorter side], [height, width], or None: as is.

    Raises:
        RequestError: none of native, train, N and HxW.
    """
    if text == "native":
        return None
    if text == "train":
        return [min(train)]
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    size = [int(n) for n in match.groups() if n] if match else []
    if not size or min(size) < 1:
        raise RequestError(
            f"--size {text}: say native, train, the shorter side (256), or height and width "
            "(256x320)"
        )
    return size


def resized(image: Image.Image, size: list[int] | None) -> Image.Image:
    if size is None:
        return image
    return v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Two pictures (C, H, W) of one size in one; a grey one beside a coloured one gets colours."""
    channels = max(left.shape[0], right.shape[0])
    return torch.cat([each.expand(channels, -1, -1) for each in (left, right)], 2)
