"""How good the default runs are over several seeds, read by an outsider too.

    python train.py -m seed=0,1,2 norm=instance
    python train.py -m seed=0,1,2 model=resblock_gan norm=conditional_batch
    python -m benchmarks.defaults [FOLDER ...]

The outsider is a support vector machine on the pixels of the real training images. It shares
nothing with the classifier that the training's own figures come from.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor

from gannorm.commands.trained import load_task
from gannorm.data import Source, build_data, fetch_all
from gannorm.errors import RequestError, answering_requests
from gannorm.metrics.evaluation import in_chunks
from gannorm.tasks import ClassConditional, CycleGAN, Task
from gannorm.training.checkpoint import flat

FREE = ("seed", "resume", "data.num_workers", "metrics.cache")  # may differ
SAMPLES = 1000  # of a class-conditional generator
WAYS = {"AtoB": ("G_A", 0, 1), "BtoA": ("G_B", 1, 0)}  # generator, its domain, the other
# Key in `quality`, what to call it, how it is written.
FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy", "read right by the training's classifier", "{:.1%}".format),
    ("outsider", "by a support vector machine", "{:.1%}".format),
    ("fid", "FID", "{:.1f}".format),
    ("coverage", "coverage", "{:.2f}".format),
)
Figures = dict[str, dict[str, float]]  # by direction ("" without one), those of FIGURES


def reader(source: Source) -> SVC:
    """A classifier of the pixels of `source`'s images."""
    batch = fetch_all(source)
    return SVC().fit(batch["image"].flatten(1).numpy(), batch["label"].numpy())


def read_right(svm: SVC, images: Tensor, labels: Tensor) -> float:
    return float(svm.score(images.cpu().flatten(1).numpy(), labels.numpy()))


@torch.no_grad()
def outsider(task: Task) -> dict[str, tuple[float, float]]:
    """By direction, the share of a run's images that the outsider reads right, and of real ones."""
    data = build_data(task.cfg.data)
    test = [fetch_all(source) for source in data.test]
    with task.norm_backend():
        if isinstance(task, ClassConditional):
            svm = reader(data.real[0])
            labels = torch.arange(SAMPLES) % (task.num_classes or 1)
            generator = torch.Generator().manual_seed(20)  # noise that the training never drew
            noise = torch.randn(SAMPLES, task.model.z_dim, generator=generator)
            made = in_chunks(task.averaged["G"], noise.to(task.device), labels.to(task.device))
            real = read_right(svm, test[0]["image"], test[0]["label"])
            return {"": (read_right(svm, made, labels), real)}
        assert isinstance(task, CycleGAN)
        found = {}
        for way, (net, source, target) in WAYS.items():
            svm = reader(data.real[target])
            made = in_chunks(task.averaged[net], test[source]["image"].to(task.device))
            real = read_right(svm, test[target]["image"], test[target]["label"])
            found[way] = read_right(svm, made, test[source]["label"]), real
        return found


def figures(folder: Path, task: Task) -> Figures:
    """A run's final figures by direction, each beside that of real images as FIGURE_real."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found: Figures = {}
    for way, (share, real) in outsider(task).items():
        end = f"_{way}" if way else ""
        row = {"outsider": share, "outsider_real": real}
        for key, *_ in FIGURES:
            if key != "outsider":
                row[key] = summary["quality"][key + end]
                row[f"{key}_real"] = summary["reference"][f"{key}{end}_real"]
        found[way] = row
    return found


def table(runs: dict[str, list[Figures]]) -> str:
    """Markdown: mean and range over the runs of each model and direction."""
    lines = [
        "| mean (lowest to highest) | " + " | ".join(title for _, title, _ in FIGURES) + " |",
        "| --- " * (len(FIGURES) + 1) + "|",
    ]
    for model, each in runs.items():
        for way in each[0]:
            cells = []
            for key, _, shown in FIGURES:
                values = [run[way][key] for run in each]
                real = fmean(run[way][f"{key}_real"] for run in each)
                spread = f"{shown(min(values))} to {shown(max(values))}"
                cells.append(f"{shown(fmean(values))} ({spread}), real {shown(real)}")
            name = f"{model}, {way.replace('to', ' to ')}" if way else model
            lines.append(f"| {name}, {len(each)} runs | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table of all finished runs below the folders.

    Runs without labels are left out.

    Raises:
        RequestError: there is none, or runs of one name that differ in more than their seed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")])
    arguments: Any = parser.parse_args(argv)
    runs: dict[str, list[Figures]] = {}
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for top in arguments.folders:
        for path in sorted(top.rglob("summary.json")):
            folder = path.parent
            name = folder.parent.name
            task = load_task(folder)
            if task.num_classes is None:
                print(f"without labels, left out: {folder}", file=sys.stderr)
                continue
            config = flat(task.cfg.model_dump())
            other, expected = first.setdefault(name, (folder, config))
            for key in sorted(config.keys() | expected.keys()):
                a, b = expected.get(key), config.get(key)
                if a != b and key not in FREE:
                    raise RequestError(
                        f"{other} and {folder} are no runs of one configuration: {key} is {a} and "
                        f"{b}; name the folders of one, or leave one out"
                    )
            runs.setdefault(name, []).append(figures(folder, task))
    if not runs:
        names = ", ".join(map(str, arguments.folders))
        raise RequestError(f"no finished run (summary.json) below {names}")
    print(table(runs))


if __name__ == "__main__":
    with answering_requests():
        main()
