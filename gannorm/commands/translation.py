"""`python -m gannorm translate`: a folder of images, translated."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from gannorm.commands.trained import load_task, make_folder, write_image
from gannorm.data.images import list_images, open_image, to_tensor
from gannorm.errors import RequestError
from gannorm.tasks import CycleGAN


def add(commands: Any) -> None:
    two = commands.add_parser("translate", help="translate a folder of images")
    two.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    two.add_argument("source", type=Path, metavar="IN_DIR")
    two.add_argument("target", type=Path, metavar="OUT_DIR")
    two.add_argument("--direction", choices=("AtoB", "BtoA"), required=True)
    two.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    translate(a.checkpoint, a.source, a.target, a.direction)


@torch.no_grad()
def translate(path: Path, source: Path, target: Path, direction: str) -> None:
    """Translate every image below `source` into `target`, under the same name, as PNG.

    Any size, any of the formats in `gannorm.data.images`; the averaged generator is used.

    Raises:
        RequestError: no images there, two that would get the same name, or unreadable ones (after
            all others were translated).
    """
    paths = list_images(source)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise RequestError(
            f"{target} lies in {source}: its images would be overwritten or translated again; "
            "choose another folder for the translations"
        )
    names: dict[Path, Path] = {}
    for p in paths:
        name = p.relative_to(source).with_suffix(".png")
        if name in names:
            raise RequestError(
                f"{names[name]} and {p} would both become {target / name}; rename one of them"
            )
        names[name] = p
    task = load_task(path, "cyclegan")
    make_folder(target)
    assert isinstance(task, CycleGAN)
    net = task.averaged["G_A" if direction == "AtoB" else "G_B"]
    multiple = 2**task.model.downsamplings
    unreadable = []
    with task.norm_backend():
        for name, p in tqdm(names.items(), unit="image"):
            try:
                image = to_tensor(open_image(p, task.cfg.data.channels))
            except RequestError as error:
                unreadable.append(str(error))
                continue
            written = target / name
            written.parent.mkdir(parents=True, exist_ok=True)
            write_image(_any_size(net, image.to(task.device), multiple), written)
    print(f"{len(names) - len(unreadable)} images in {target}")
    if unreadable:
        raise RequestError(f"{len(unreadable)} of {len(names)} not translated: {unreadable[0]}")


def _any_size(net: torch.nn.Module, image: Tensor, multiple: int) -> Tensor:
    """Run a generator on one image (C, H, W) of any size, its border repeated where needed."""
    _, height, width = image.shape
    # Below this the reflection padding has nothing to reflect.
    smallest = 4 * multiple
    down = max(-height % multiple, smallest - height)
    right = max(-width % multiple, smallest - width)
    padded = pad(image.unsqueeze(0), (0, right, 0, down), mode="replicate")
    return net(padded)[0, :, :height, :width]
