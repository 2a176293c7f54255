"""`python -m gannorm sample`: images of a class."""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gannorm.commands.trained import load_task, make_folder, write_image
from gannorm.errors import RequestError
from gannorm.tasks import ClassConditional

CHUNK = 64  # samples generated at a time


def add(commands: Any) -> None:
    one = commands.add_parser("sample", help="generate images of a class, one PNG each")
    one.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    one.add_argument(
        "--class", dest="label", type=int, metavar="K", help="class number; all in turn by default"
    )
    one.add_argument("--count", type=int, default=100, help="how many images (100)")
    one.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    one.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR")
    one.add_argument(
        "--truncation", type=float, metavar="T", help="noise within +-T alone; all by default"
    )
    one.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    sample(a.checkpoint, a.label, a.count, a.seed, a.out, a.truncation)


@torch.no_grad()
def sample(
    path: Path,
    label: int | None,
    count: int,
    seed: int,
    out: Path,
    truncation: float | None = None,
) -> None:
    """Write `count` PNG files `class{label}_seed{seed}_{number}.png` of class `label` into `out`.

    Without a label the classes take turns. The averaged generator is used. The same seed gives
    the same images, whatever `count` is.

    truncation: noise from the part of the normal distribution within +-truncation: the smaller,
        the more typical and the less varied the images (Brock et al., 2019).

    Raises:
        RequestError: a class that the model does not have, a count below 1, or a truncation that
            is not positive.
    """
    task = load_task(path, "resblock_gan")
    assert isinstance(task, ClassConditional)
    classes = task.num_classes or 0
    if label is not None and not 0 <= label < classes:
        raise RequestError(f"--class {label}: the model has classes 0 to {classes - 1}")
    if count < 1:
        raise RequestError(f"--count {count} must be at least 1")
    if truncation is not None and not 0 < truncation < float("inf"):
        raise RequestError(f"--truncation {truncation} must be positive, 0.5 for example")
    if not -(2**63) <= seed < 2**64:
        raise RequestError(f"--seed {seed} must fit into 64 bits")
    make_folder(out)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=count, unit="image") as bar, task.norm_backend():
        for start in range(0, count, CHUNK):
            numbers = torch.arange(start, start + CHUNK)
            labels = numbers % classes if label is None else torch.full((CHUNK,), label)
            noise = torch.randn(CHUNK, task.model.z_dim, generator=generator)
            if truncation is not None:
                torch.nn.init.trunc_normal_(noise, a=-truncation, b=truncation, generator=generator)
            images = task.averaged["G"](noise.to(task.device), labels.to(task.device))
            for number, image, k in zip(numbers.tolist(), images, labels.tolist(), strict=True):
                if number < count:
                    write_image(image, out / f"class{k}_seed{seed}_{number:05d}.png")
                    bar.update()
    print(f"{count} images in {out}")
