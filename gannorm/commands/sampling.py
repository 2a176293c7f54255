"""`python -m gannorm sample`: images of classes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gannorm.commands.classes import (
    CHUNK,
    between_classes,
    between_seeds,
    draw_noise,
    image_of,
    pick_classes,
    pick_seeds,
    stems,
)
from gannorm.commands.trained import load_task, make_folder, pick_generator, write_image
from gannorm.errors import RequestError
from gannorm.tasks import ClassConditional
from gannorm.training.captions import sheet

COUNT = 100  # images, by default
COLUMNS = range(10)  # seeds of a grid, by default
MOST_TILES = 10_000  # images in one picture
EXAMPLE = """examples:
  python -m gannorm sample outputs/RUN --class cat --count 20
  python -m gannorm sample outputs/RUN --class cat,dog --seeds 0-99
  python -m gannorm sample outputs/RUN --grid --seeds 0-9
  python -m gannorm sample outputs/RUN --class cat,dog --interpolate 8 --seeds 0
"""


def add(commands: Any) -> None:
    one = commands.add_parser(
        "sample", help="generate images of classes: PNG files, a grid, an interpolation",
        epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    one.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    one.add_argument(
        "--class", dest="label", action="append", metavar="NAME",
        help="name or number of a class, several with commas; all by default, in turn",
    )  # fmt: skip
    one.add_argument("--count", type=int, help=f"how many images ({COUNT})")
    one.add_argument("--seed", type=int, help="of the noise of all of them (0)")
    one.add_argument(
        "--seeds", metavar="0-99 | 0,3,7",
        help="an image for each of these seeds and each class, in the place of --count and --seed",
    )  # fmt: skip
    one.add_argument(
        "--grid", action="store_true",
        help="one picture, grid.png: a row for each class, a column for each seed (0-9)",
    )  # fmt: skip
    one.add_argument(
        "--interpolate", type=int, metavar="N",
        help="one picture: N images from one class or one seed to another",
    )  # fmt: skip
    one.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR")
    one.add_argument(
        "--truncation", type=float, metavar="T", help="noise within +-T alone; all by default"
    )
    one.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    sample(
        a.checkpoint, a.label, a.count, a.seed, a.out, a.truncation,
        seeds=a.seeds, grid=a.grid, interpolate=a.interpolate,
    )  # fmt: skip


def sample(
    path: Path,
    label: int | str | Sequence[int | str] | None = None,
    count: int | None = None,
    seed: int | None = None,
    out: Path = Path("samples"),
    truncation: float | None = None,
    *,
    seeds: str | Sequence[int] | None = None,
    grid: bool = False,
    interpolate: int | None = None,
) -> None:
    """Write PNG files of classes into `out`; the averaged generator is used.

    By default `count` (100) files `class{name}_seed{seed}_{number}.png`, the classes of `label`,
    or all, in turn; the same `seed` (0) gives the same images, whatever `count` is. With `seeds`
    a file `class{name}_seed{s}.png` for each class and each seed s, which depends on these two
    and nothing else. Characters of a name that no file name can have become _.

    label: names or numbers of classes. seeds: "0-99", "0,3,7", or numbers.
    grid: in their place one picture `grid.png`, rows of classes, columns of `seeds` (0-9).
    interpolate: so many images in one row, from one class to another for one of the `seeds` (0),
        or for one class from one of two `seeds` to the other.
    truncation: noise from the part of the normal distribution within +-truncation: the smaller,
        the more typical and the less varied the images (Brock et al., 2019).

    Raises:
        RequestError: a class that the model does not have, counts or seeds or a truncation out of
            range, or settings that do not go together; before anything is written.
    """
    _check(count, seed, truncation, interpolate)
    if (seeds is not None or grid or interpolate is not None) and (count, seed) != (None, None):
        raise RequestError(
            "--count and --seed do not go together with --seeds, --grid or --interpolate; name "
            "the noises with --seeds 0-9"
        )
    if grid and interpolate is not None:
        raise RequestError("--grid and --interpolate are two pictures; ask for one at a time")
    numbers = [0] if seeds is None else seeds
    listed = pick_seeds(numbers if isinstance(numbers, str) else ",".join(map(str, numbers)))
    task = load_task(path, "resblock_gan")
    assert isinstance(task, ClassConditional)
    pick_generator(task, "G", path)
    asked = [label] if isinstance(label, int | str) else label or range(len(task.class_names))
    labels = pick_classes(task.class_names, list(asked))
    if interpolate is not None:
        _write_strip(task, labels, listed, interpolate, out, truncation)
    elif grid:
        _write_grid(task, labels, list(COLUMNS) if seeds is None else listed, out, truncation)
    elif seeds is not None:
        _write_each(task, labels, listed, out, truncation)
    else:
        _write_series(task, labels, COUNT if count is None else count, seed or 0, out, truncation)


def _check(
    count: int | None, seed: int | None, truncation: float | None, interpolate: int | None
) -> None:
    if count is not None and count < 1:
        raise RequestError(f"--count {count} must be at least 1")
    if truncation is not None and not 0 < truncation < float("inf"):
        raise RequestError(f"--truncation {truncation} must be positive, 0.5 for example")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise RequestError(f"--seed {seed} must fit into 64 bits")
    if interpolate is not None and not 2 <= interpolate <= 1000:
        raise RequestError(f"--interpolate {interpolate} must be 2 to 1000 images")


@torch.no_grad()
def _write_series(
    task: ClassConditional, classes: list[int], count: int, seed: int, out: Path,
    truncation: float | None,
) -> None:  # fmt: skip
    """`count` images of one stream of noise, the classes in turn."""
    names, turn = stems(task), torch.tensor(classes)
    make_folder(out)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=count, unit="image") as bar, task.norm_backend():
        for start in range(0, count, CHUNK):
            numbers = torch.arange(start, start + CHUNK)
            labels = turn[numbers % len(turn)]
            noise = draw_noise(task, generator, truncation)
            images = task.averaged["G"](noise.to(task.device), labels.to(task.device))
            for number, image, k in zip(numbers.tolist(), images, labels.tolist(), strict=True):
                if number < count:
                    write_image(image, out / f"{names[k]}_seed{seed}_{number:05d}.png")
                    bar.update()
    print(f"{count} images in {out}")


def _write_each(
    task: ClassConditional, labels: list[int], seeds: list[int], out: Path,
    truncation: float | None,
) -> None:  # fmt: skip
    """A file for each class and seed."""
    names = stems(task)
    make_folder(out)
    with tqdm(total=len(labels) * len(seeds), unit="image") as bar:
        for k in labels:
            for seed in seeds:
                image = image_of(task, k, seed, truncation)
                write_image(image, out / f"{names[k]}_seed{seed}.png")
                bar.update()
    print(f"{len(labels) * len(seeds)} images in {out}")


def _write_grid(
    task: ClassConditional, labels: list[int], seeds: list[int], out: Path,
    truncation: float | None,
) -> None:  # fmt: skip
    """grid.png: a row for each class, with its name, a column for each seed."""
    if len(labels) * len(seeds) > MOST_TILES:
        raise RequestError(
            f"--grid: {len(labels)} classes x {len(seeds)} seeds are more than {MOST_TILES} "
            "images; take fewer with --class and --seeds"
        )
    make_folder(out)
    pairs = [(k, seed) for k in labels for seed in seeds]
    images = [image_of(task, k, s, truncation) for k, s in tqdm(pairs, unit="image")]
    rows, heads = [task.class_names[k] for k in labels], [f"seed {s}" for s in seeds]
    write_image(sheet(torch.stack(images), len(seeds), rows, heads), out / "grid.png")
    print(f"{len(rows)} classes x {len(seeds)} seeds in {out / 'grid.png'}")


def _write_strip(
    task: ClassConditional, labels: list[int], seeds: list[int], count: int, out: Path,
    truncation: float | None,
) -> None:  # fmt: skip
    """`count` images in a row, from one class or seed to another."""
    safe = [stems(task)[k] for k in labels]
    if (len(labels), len(seeds)) == (2, 1):
        name = f"{safe[0]}_to_{safe[1]}_seed{seeds[0]}_{count}.png"
        shares = torch.linspace(0, 1, count).tolist()
        first, last = labels
        images = between_classes(task, (first, last), seeds, shares, truncation)
    elif (len(labels), len(seeds)) == (1, 2):
        name = f"{safe[0]}_seed{seeds[0]}_to_seed{seeds[1]}_{count}.png"
        images = between_seeds(task, labels[0], (seeds[0], seeds[1]), count, truncation)
    else:
        raise RequestError(
            f"--interpolate goes between two classes for one seed or two seeds for one class, not "
            f"{len(labels)} classes and {len(seeds)} seeds; write --class A,B --seeds 0, or "
            "--class A --seeds 0,1"
        )
    make_folder(out)
    write_image(sheet(images, count), out / name)
    print(f"{count} images in {out / name}")
