"""The norm study's pictures: curves over the steps, samples of all norms side by side."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from gannorm.study.runs import COLUMNS, Column, Run, Runs, label, spread
from gannorm.training.captions import SMALLEST_TILE

COLOURS = {
    "instance": "tab:blue", "batch": "tab:orange", "group": "tab:green", "layer": "tab:red",
    "none": "tab:gray", "conditional_batch": "tab:purple", "conditional_instance": "tab:cyan",
}  # fmt: skip
DASHES = {"": "-", "gamma_0": "--", "moving_var_0": ":"}
PADDING, GAP = 4, 16  # between the tiles and the grids of a run's sample picture
TILE = 64  # pixels here; smaller images are enlarged by a whole factor
SHOWN = {
    "cyclegan": (Column("accuracy_BtoA", "accuracy B to A"),
                 Column("accuracy_AtoB", "accuracy A to B"),
                 Column("fid", "FID, mean of both directions")),
    "resblock_gan": COLUMNS["resblock_gan"][:3],
}  # fmt: skip


def draw(runs: Runs, folder: Path) -> dict[str, list[Path]]:
    """Write the PNGs into `folder`: their paths by model."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, list[Path]] = {}
    for model in SHOWN:
        mine = {name: each for name, each in runs.items() if each[0].member.model == model}
        if mine:
            pictures[model] = [curves(mine, SHOWN[model], folder / f"{model}_curves.png")]
            samples = translations if model == "cyclegan" else classes
            pictures[model] += samples(mine, folder)
    return pictures


def curves(runs: Runs, figures: Iterable[Column], path: Path) -> Path:
    """A row for each batch size, a column for each figure: mean over seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = list(figures)
    sizes = sorted({found[0].batch_size for found in runs.values()})
    shape = (len(sizes), len(figures))
    height = 3.1 * len(sizes) + 0.7
    picture, axes = pyplot.subplots(*shape, figsize=(11, height), sharey="col", squeeze=False)
    for size, line in zip(sizes, axes, strict=True):
        alike = [found for found in runs.values() if found[0].batch_size == size]
        for axis, figure in zip(line, figures, strict=True):
            for found in alike:
                _curve(axis, found, figure)
            reference = alike[0][0].summary["reference"]
            real = reference.get(f"{figure.key}_real")
            if real is not None:
                axis.axhline(
                    real, color="black", linewidth=0.8, linestyle=(0, (1, 3)), label="real images"
                )
            axis.set_title(f"{figure.title}, batch size {size}", fontsize=10)
            axis.grid(alpha=0.25)
            axis.set(**({"ylim": (0, 1.03)} if figure.higher else {"yscale": "log"}))
    for axis in axes[-1]:
        axis.set_xlabel("steps")
    known = {text: line for axis in axes.flat
             for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    below = 0.1 + 0.22 * math.ceil(len(known) / 5)  # inches
    picture.tight_layout(rect=(0, below / height, 1, 1))
    picture.legend(known.values(), known, loc="lower center", ncols=5, fontsize=9, frameon=False)
    picture.savefig(path, dpi=85)
    pyplot.close(picture)
    return _small(Image.open(path).convert("RGB"), path)


def _curve(axis: Any, runs: list[Run], figure: Column) -> None:
    member = runs[0].member
    steps, means, low, high = [], [], [], []
    for k, line in enumerate(runs[0].evaluations):
        found = spread(runs, figure, k)
        if found is not None:
            steps.append(line["step"])
            means.append(found.mean)
            low.append(min(found.values))
            high.append(max(found.values))
    colour = COLOURS.get(member.norm, "black")
    axis.plot(steps, means, DASHES[member.mistake], color=colour, label=label(member), lw=1.6)
    axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


# ---- samples


class Sheet:
    """The last sample picture of a run, cut into its tiles."""

    def __init__(self, run: Run, columns: int) -> None:
        self.size = run.config["data"]["image_size"]
        self.tile = self.size * max(1, SMALLEST_TILE // self.size)
        self.image = Image.open(sorted((run.folder / "samples").glob("step_*.png"))[-1])
        self.grid = columns * (self.tile + PADDING) + PADDING
        # Names of classes stand at the left, the grid at the right.
        named = run.config["data"]["name"] == "image_folder" and self.image.width > self.grid
        self.left = self.image.width - self.grid if named else 0
        self.rows = (self.image.height - PADDING) // (self.tile + PADDING)
        if self.image.width - self.left not in (self.grid, 2 * self.grid + GAP):
            raise ValueError(f"{run.folder}: a sample picture of another layout")

    def __call__(self, row: int, column: int, grid: int = 0) -> Image.Image:
        x, y = (PADDING + k * (self.tile + PADDING) for k in (column, row))
        x += self.left + grid * (self.grid + GAP)
        tile = self.image.crop((x, y, x + self.tile, y + self.tile)).convert("RGB")
        small = tile.resize((self.size, self.size), Image.Resampling.NEAREST)
        shown = self.size * max(1, TILE // self.size)
        return small.resize((shown, shown), Image.Resampling.NEAREST)


Strip = tuple[str, list[list[Image.Image]]]  # a label, and blocks of tiles


def classes(runs: Runs, folder: Path) -> list[Path]:
    """A row for each norm: two noises in every class, of the first seed."""
    strips: list[Strip] = []
    for found in runs.values():
        sheet = Sheet(found[0], 10)
        blocks = [[sheet(row, noise) for row in range(sheet.rows)] for noise in range(2)]
        strips.append((label(found[0].member), blocks))
    titles = ["one noise in every class", "another"]
    return [_strips(strips, titles, folder / "resblock_gan_samples.png", 24)]  # mostly grey


def translations(runs: Runs, folder: Path) -> list[Path]:
    """For each direction: the originals, and a row for each norm; a block for each batch size."""
    paths = []
    sizes = sorted({found[0].batch_size for found in runs.values()})
    norms = list(dict.fromkeys(found[0].member.norm for found in runs.values()))
    for grid, name in enumerate(("A to B", "B to A")):
        first = Sheet(next(iter(runs.values()))[0], 3)
        count = min(first.rows, 8)
        originals = [first(k, 0, grid) for k in range(count)]
        blank = [Image.new("RGB", tile.size, "white") for tile in originals]
        strips: list[Strip] = [("original", [originals] * len(sizes))]
        for norm in norms:
            blocks = []
            for size in sizes:
                alike = [f[0] for f in runs.values()
                         if (f[0].member.norm, f[0].batch_size) == (norm, size)]  # fmt: skip
                sheet = Sheet(alike[0], 3) if alike else None
                blocks.append([sheet(k, 1, grid) for k in range(count)] if sheet else blank)
            strips.append((norm, blocks))
        titles = [f"{name}, batch size {size}" for size in sizes]
        path = folder / f"cyclegan_{name.replace(' to ', 'to')}.png"
        paths.append(_strips(strips, titles, path))
    return paths


def _strips(strips: list[Strip], titles: list[str], path: Path, colours: int = 128) -> Path:
    """Labelled rows of tiles under the blocks' titles."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(file), 14)
    side = strips[0][1][0][0].width
    left = 16 + max(int(font.getlength(text)) for text, _ in strips)
    width = sum(len(block) * (side + 2) + 14 for block in strips[0][1])
    page = Image.new("RGB", (left + width, 26 + len(strips) * (side + 2)), "white")
    pen = ImageDraw.Draw(page)
    for i, (text, blocks) in enumerate(strips):
        x, y = left, 26 + i * (side + 2)
        pen.text((8, y + side // 2 - 9), text, "black", font)
        for title, block in zip(titles, blocks, strict=True):
            if i == 0:
                pen.text((x, 4), title, "black", font)
            for tile in block:
                page.paste(tile, (x, y))
                x += side + 2
            x += 14
    return _small(page, path, colours)


def _small(image: Image.Image, path: Path, colours: int = 128) -> Path:
    """A PNG of few colours, for the repository's sake."""
    image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
