"""How time and memory of a training step grow with the batch and with the images.

    python -m benchmarks.growth

Batches of 1 to 64 and images of 64x64 to 512x512 for a narrow CycleGAN (width 16, 3 blocks: its
largest step takes about 2 GB), batches for a projection GAN of 64 filters at 32x32. Random images,
on a CPU. Each point has a process of its own: its peak is that of no other. Time is the median of
the steps behind the warm-up; of several rounds the least counts, since what else a machine does
only adds. Memory is the peak of the first steps, and what of it they added to the networks.

Held against pixels x batch: a least-squares line, and the largest step between neighbours. No step
over 1.3 times: n2/n1 times the pixels take at most 1.3 * n2/n1 times as much.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import timing
from benchmarks.profile import SMALL, WIDTHS
from benchmarks.scaling import Training, table
from gannorm.errors import RequestError, answering_requests

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (64, 96, 128, 192, 256, 384, 512)
NARROW = ["experiment=cyclegan_horse2zebra", "data.root=.", "data.preprocess=none",
          "model.width=16", "model.blocks=3", "model.d_width=16"]  # fmt: skip
OVER = 1.3
WARM, FEW, MANY = 2, 5, 30  # steps: before the clock; at least, and where the peak is read; at most
SHOWN = {"milliseconds": "ms a step", "megabytes": "MB that it takes"}  # what is judged and drawn
Point = dict[str, float]


class Series(NamedTuple):
    """Points that differ in the batch or in the images' size alone."""

    name: str
    overrides: list[str]
    axis: str
    values: tuple[int, ...]
    other: int  # the size, or the batch

    def at(self, value: int) -> tuple[int, int]:
        """Batch and size."""
        return (value, self.other) if self.axis == "batch" else (self.other, value)


SERIES = [
    Series("CycleGAN, 64x64", NARROW, "batch", BATCHES, 64),
    Series("CycleGAN, batch 1", NARROW, "size", SIZES, 1),
    Series("projection GAN, 32x32", ["experiment=sngan_cifar10", *WIDTHS, "optim.d_steps=1"],
           "batch", BATCHES, 32),
]  # fmt: skip


def quick(series: Series) -> Series:
    task = "cyclegan" if series.overrides is NARROW else "resblock_gan"
    small = [o for o in SMALL[task] if not o.startswith("data.")]
    return series._replace(overrides=[*series.overrides, *small], values=series.values[:2])


# ---- a point, in a process of its own


def point(overrides: list[str], threads: int, seconds: float) -> Point:
    torch.set_num_threads(threads)
    timing.use_device("cpu")
    training = Training(overrides, synthetic=True)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what it is now
    before, found, peak = timing.resident("RSS"), list[float](), 0.0
    began = time.perf_counter()
    while len(found) < WARM + FEW or (
        len(found) < WARM + MANY and time.perf_counter() - began < seconds
    ):
        start = time.perf_counter()
        training.step()
        found.append(1000 * (time.perf_counter() - start))
        if len(found) == FEW:  # the same for all: image pools grow with the steps
            peak = timing.resident("HWM")
    return {
        "milliseconds": statistics.median(found[WARM:]), "megabytes": peak - before,
        "peak_megabytes": peak, "steps": len(found) - WARM,
    }  # fmt: skip


def alone(overrides: list[str], seconds: float) -> Point:
    """`point` in a new process, forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.profile"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(point, overrides, torch.get_num_threads(), seconds).result()


def measured(series: Series, value: int, seconds: float) -> Point:
    batch, size = series.at(value)
    shape = [f"data.batch_size={batch}", f"data.image_size={size}"]
    found = alone([*series.overrides, *shape], seconds)
    return {"batch": batch, "size": size, "pixels": batch * size * size, **found}


# ---- judge


def line(points: list[Point], what: str) -> dict[str, float]:
    """Least squares: `what` = fixed + each * pixels; r2 is the share of its variance."""
    x, y = (np.array([p[key] for p in points], dtype=float) for key in ("pixels", what))
    each, fixed = np.polyfit(x, y, 1)
    off, spread = np.sum((y - fixed - each * x) ** 2), np.sum((y - y.mean()) ** 2)
    return {
        "fixed": float(fixed),
        "per_megapixel": 1e6 * float(each),
        "r2": float(1 - off / spread),
    }


def steepest(points: list[Point], what: str) -> dict[str, Any]:
    """The neighbours between which `what` grows most, in terms of linear growth."""
    found = [
        (max(b[what], 1e-9) / max(a[what], 1e-9) * a["pixels"] / b["pixels"], a, b)
        for a, b in zip(points, points[1:], strict=False)
    ]
    relative, a, b = max(found, key=lambda each: each[0])
    where = f"{a['batch']}x{a['size']}x{a['size']} to {b['batch']}x{b['size']}x{b['size']}"
    return {"relative": relative, "where": where, "smooth": relative <= OVER}


def judged(points: list[Point]) -> dict[str, Any]:
    return {what: {**line(points, what), **steepest(points, what)} for what in SHOWN}


def told(result: dict[str, Any]) -> str:
    """Markdown."""
    texts, rows = [], []
    for found in result["series"]:
        lines = [
            [f"{p['batch']} x {p['size']}x{p['size']}", f"{p['milliseconds']:.1f}",
             f"{1e6 * p['milliseconds'] / p['pixels']:.0f}", f"{p['megabytes']:.0f}",
             f"{1e6 * p['megabytes'] / p['pixels']:.0f}", f"{p['peak_megabytes']:.0f}"]
            for p in found["points"]
        ]  # fmt: skip
        head = [found["name"], "ms a step", "ms a megapixel", "MB that it takes", "MB a megapixel",
                "MB of the process, at its peak"]  # fmt: skip
        texts.append(table(head, lines))
        for what, words in SHOWN.items():
            fit = found["judged"][what]
            rows.append(
                [f"{found['name']}: {words}",
                 f"{fit['fixed']:.1f} + {fit['per_megapixel']:.0f} a megapixel", f"{fit['r2']:.4f}",
                 f"{fit['relative']:.2f} ({fit['where']})", "yes" if fit["smooth"] else "NO"]
            )  # fmt: skip
    head = ["over pixels x batch", "line", "R2", "largest step, of linear growth"]
    texts.append(table([*head, f"no step over {OVER} times"], rows))
    return "\n\n".join(texts)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex="col")
    for row, (what, words) in zip(axes, SHOWN.items(), strict=True):
        for found in result["series"]:
            axis = row[int(found["axis"] == "size")]
            pixels, values = ([p[key] for p in found["points"]] for key in ("pixels", what))
            along = [p[found["axis"]] for p in found["points"]]
            (drawn,) = axis.plot(along, values, marker="o", label=found["name"])
            linear = [values[-1] * each / pixels[-1] for each in pixels]
            axis.plot(along, linear, color=drawn.get_color(), linewidth=1, linestyle="--")
            axis.set(xscale="log", yscale="log", ylabel=words)
            axis.set_xticks(along, [str(n) for n in along])
            axis.minorticks_off()
            axis.legend()
    axes[1][0].set_xlabel("batch")
    axes[1][1].set_xlabel("height and width of the images")
    figure.suptitle(f"{result['device']}, {result['date']}; dashed: linear in pixels x batch")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small networks, two points of each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a point, where it can be")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    if math.isnan(timing.resident("RSS")):
        raise RequestError("memory is read from /proc/self/status, which Linux alone has")
    rounds, seconds = (1, 0.0) if args.quick else (args.rounds, args.seconds)
    result: dict[str, Any] = timing.environment("cpu") | {
        "protocol": f"a process for each point; medians of {FEW} to {MANY} steps behind {WARM}, "
        f"the least of {rounds} rounds; memory: VmHWM behind {FEW} steps, less VmRSS before them; "
        "memory that is freed stays with the process",
        "series": [],
    }
    path = timing.result_path(result, args.out, "growth-")
    every = [quick(each) if args.quick else each for each in SERIES]
    todo = [(series, value) for _ in range(rounds) for series in every for value in series.values]
    points: dict[tuple[str, int], Point] = {}
    for series, value in tqdm(todo, unit="point"):
        found = measured(series, value, seconds)
        key = series.name, value
        points[key] = min(found, points.get(key, found), key=lambda each: each["milliseconds"])
    for series in every:
        own = [points[series.name, value] for value in series.values]
        result["series"].append({
            **series._asdict(), "points": own, "judged": judged(own),
        })  # fmt: skip
    timing.write(result, path)
    if args.plot:
        draw(result, args.plot)
    print(f"{result['device']}\n\n{told(result)}\n\n{path}")
    return 0


if __name__ == "__main__":
    with answering_requests():
        sys.exit(main())
