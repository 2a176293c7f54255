"""The norm study's report: the runs of `study=` as tables, curves and samples.

    python train.py -m seed=0,1,2 'study=glob(*)'
    python -m benchmarks.norm_study [FOLDER] [--out docs/norm_study.md]

Its sentences are made from the figures: a difference counts where the seeds' ranges do not overlap.
Runs that are missing are named, those that are there make the report.
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from benchmarks.timing import device_name
from gannorm.errors import RequestError, answering_requests
from gannorm.metrics.figures import average
from gannorm.study.members import FOLDER, LOSS, Member, members
from gannorm.training.checkpoint import flat

SEEDS = (0, 1, 2)
COMMANDS = """\
python train.py -m seed=0,1,2 'study=glob(*)'
python -m benchmarks.norm_study"""
# Keys that may differ.
OWN = ("seed", "resume", "norm.", "trainer.", "metrics.cache", "data.batch_size")
TITLES = {"cyclegan": "CycleGAN", "resblock_gan": "Class-conditional ResBlock GAN"}


@dataclass(frozen=True)
class Figure:
    """A figure of quality; a `key` without a direction means the average of both."""

    key: str
    title: str
    higher: bool = False
    group: str = "quality"

    def of(self, values: dict[str, float]) -> float | None:
        return values[self.key] if self.key in values else average(self.key, values)

    def shown(self, value: float) -> str:
        if self.key.startswith("accuracy"):
            return f"{value:.1%}"
        digits = 3 if self.key.startswith("cycle") else 2
        return f"{value:.{digits if value < 100 else 0}f}"

    def difference(self, first: float, second: float) -> str:
        sign, shown = "-" if first < second else "+", self.shown(abs(first - second))
        return sign + (f"{shown[:-1]} points" if shown.endswith("%") else shown)


FIGURES = {
    "cyclegan": (
        Figure("accuracy_BtoA", "accuracy B to A", True),
        Figure("accuracy_AtoB", "accuracy A to B", True),
        Figure("fid_BtoA", "FID B to A"),
        Figure("fid_AtoB", "FID A to B"),
        Figure("coverage_BtoA", "coverage B to A", True),
        Figure("coverage_AtoB", "coverage A to B", True),
        Figure("cycle_l1", "cycle error (L1)"),
        Figure("accuracy_BtoA", "accuracy B to A of the trained weights", True, "quality_raw"),
        Figure("fid_BtoA", "FID B to A of the trained weights", group="quality_raw"),
    ),
    "resblock_gan": (
        Figure("accuracy", "accuracy", True),
        Figure("fid", "FID"),
        Figure("coverage", "coverage", True),
        Figure("fid", "FID of the trained weights", group="quality_raw"),
    ),
}


@dataclass(frozen=True)
class Question:
    """Whether `first` is better than `second`, and how to say so."""

    text: str
    first: str
    second: str
    better: str = "Yes"
    worse: str = "No, the reverse"
    neither: str = "The seeds do not tell them apart"
    early: bool = False  # ask about the first evaluation too


COST = ("It costs", "It helps", "No cost beyond the seeds' spread", True)
RIGHT = "resblock_gan-conditional_batch-16"
QUESTIONS = (
    Question("Does instance norm beat batch norm at batch size 1?",
             "cyclegan-instance-1", "cyclegan-batch-1"),
    Question("And at batch size 16?", "cyclegan-instance-16", "cyclegan-batch-16"),
    Question("Does conditional batch norm beat plain batch norm for labelled data?",
             RIGHT, "resblock_gan-batch-16"),
    Question("What does a gamma that starts at 0 cost?", RIGHT, f"{RIGHT}-gamma_0", *COST),
    Question("What does a moving variance that starts at 0 cost?",
             RIGHT, f"{RIGHT}-moving_var_0", *COST),
)  # fmt: skip


@dataclass
class Run:
    """A finished run of a member."""

    member: Member
    seed: int
    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    evaluations: list[dict[str, float]]  # lines of metrics.jsonl, in order

    @property
    def batch_size(self) -> int:
        return self.config["data"]["batch_size"]

    def value(self, figure: Figure, evaluation: int = -1) -> float | None:
        prefix = f"{figure.group}/"
        line = self.evaluations[evaluation]
        return figure.of(
            {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        )


Runs = dict[str, list[Run]]  # by member


def read(folder: Path) -> tuple[Runs, list[str]]:
    """The finished runs below `folder`, and what is absent, a line each.

    Raises:
        RequestError: no run at all, or runs that cannot be compared.
    """
    runs: Runs = {}
    absent = []
    for name, member in members().items():
        seeds = {int(p.name.removeprefix("seed_")) for p in (folder / name).glob("seed_*")}
        for seed in sorted(seeds | set(SEEDS)):
            place = folder / name / f"seed_{seed}"
            if (place / "summary.json").exists():
                runs.setdefault(name, []).append(_run(member, seed, place))
            else:
                absent.append(f"`{name}`, seed {seed}: {_why_absent(place)}")
    if not runs:
        raise RequestError(f"no finished run of the study in {folder}; first: {COMMANDS}")
    for model in TITLES:
        _check_comparable([run for found in runs.values() for run in found
                           if run.member.model == model])  # fmt: skip
    return runs, absent


def _run(member: Member, seed: int, folder: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"))
    assert isinstance(config, dict)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    lines = _lines(folder)
    evaluations = [line for line in lines if any(key.startswith("quality/") for key in line)]
    return Run(member, seed, folder, summary, {str(k): v for k, v in config.items()}, evaluations)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, but for a last line that a crash cut short."""
    found = []
    for line in (folder / "metrics.jsonl").open(encoding="utf-8"):
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _why_absent(folder: Path) -> str:
    lines = _lines(folder) if (folder / "metrics.jsonl").exists() else []
    if not lines:
        return "not started"
    if lines[-1].get("health/not_finite"):
        return f"became NaN before step {lines[-1]['step']}"
    return f"unfinished, at step {lines[-1]['step']}"


def _check_comparable(runs: list[Run]) -> None:
    """Of one model: all alike but for what the study varies; of a batch size, as long, and
    evaluated as often."""
    every = "trainer.eval_every"
    for run in runs[1:]:
        near = next(other for other in runs if other.batch_size == run.batch_size)
        one, two, beside = flat(runs[0].config), flat(run.config), flat(near.config)
        pairs = [
            (runs[0], key, one.get(key), two.get(key))
            for key in sorted(one.keys() | two)
            if not key.startswith(OWN)
        ]
        pairs.append((near, "steps", near.summary["steps"], run.summary["steps"]))
        pairs.append((near, every, beside[every], two[every]))
        for other, key, a, b in pairs:
            if a != b:
                raise RequestError(
                    f"{other.folder} and {run.folder} cannot be compared: {key} is {a} and {b}; "
                    "train them alike, or leave one out"
                )


# ---- figures of several seeds


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def half(self) -> float:
        return (max(self.values) - min(self.values)) / 2

    def overlaps(self, other: "Spread") -> bool:
        return min(self.values) <= max(other.values) and min(other.values) <= max(self.values)


def spread(runs: Sequence[Run], figure: Figure, evaluation: int = -1) -> Spread | None:
    values = [run.value(figure, evaluation) for run in runs]
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known else None


def label(member: Member) -> str:
    return member.norm + (f", {member.mistake.replace('_0', ' 0')}" if member.mistake else "")


# ---- Markdown


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(model: str, runs: Runs) -> str:
    """A line for each member, and for the real images; the best mean of a batch size in bold."""
    figures = FIGURES[model]
    shown = [name for name in members() if name in runs and runs[name][0].member.model == model]
    spreads = [{name: spread(runs[name], figure) for name in shown} for figure in figures]
    head = ["norm", "batch", "runs", *(f.title for f in figures), "images/s", "training"]
    lines = [row(head), row(["---"] * len(head))]
    for name in shown:
        found = runs[name]
        cells = [label(found[0].member), str(found[0].batch_size), str(len(found))]
        for figure, column in zip(figures, spreads, strict=True):
            means = [
                s.mean for other, s in column.items()
                if s is not None and runs[other][0].batch_size == found[0].batch_size
            ]  # fmt: skip
            one = column[name]
            if one is None:
                cells.append("")
                continue
            cell = f"{figure.shown(one.mean)} ± {figure.shown(one.half)}"
            best = one.mean == (max(means) if figure.higher else min(means))
            cells.append(f"**{cell}**" if best else cell)
        cells.append(f"{fmean(r.summary['images_per_second'] for r in found):.0f}")
        cells.append(f"{fmean(r.summary['training_seconds'] for r in found):.0f} s")
        lines.append(row(cells))
    reference = runs[shown[0]][0].summary["reference"]
    for kind in ("real", "untranslated"):
        values = [reference.get(f"{figure.key}_{kind}") for figure in figures]
        if any(value is not None for value in values):
            cells = [
                "" if value is None else figure.shown(value)
                for figure, value in zip(figures, values, strict=True)
            ]
            lines.append(row([f"*{kind} images*", "", "", *cells, "", ""]))
    return "\n".join(lines)


def answer(question: Question, runs: Runs) -> str:
    """The verdict on a question and the figures that it follows from."""
    lines = [f"### {question.text}"]
    lacking = [name for name in (question.first, question.second) if len(runs.get(name, ())) < 2]
    if lacking:
        those = " and ".join(f"`{name}`" for name in lacking)
        return f"{lines[0]}\n\nNot known: fewer than two runs of {those}."
    one, two = runs[question.first], runs[question.second]
    names = [label(found[0].member) for found in (one, two)]
    for evaluation in (0, -1) if question.early else (-1,):
        step = one[0].evaluations[evaluation]["step"]
        when = f"At the first evaluation, step {step}" if evaluation == 0 else "At the end"
        sides: dict[str, list[str]] = {"better": [], "worse": [], "neither": []}
        rows = []
        for figure in FIGURES[one[0].member.model]:
            a, b = spread(one, figure, evaluation), spread(two, figure, evaluation)
            if a is None or b is None:
                continue
            side = "better" if (a.mean > b.mean) == figure.higher else "worse"
            sides["neither" if a.overlaps(b) else side].append(figure.title)
            rows.append(row([
                figure.title, *(f"{figure.shown(s.mean)} ± {figure.shown(s.half)}" for s in (a, b)),
                figure.difference(a.mean, b.mean), "yes" if a.overlaps(b) else "no",
            ]))  # fmt: skip
        head = row([when.lower(), *names, "difference", "ranges overlap"])
        lines += [f"{when}: {verdict(question, sides, names)}"]
        lines += ["\n".join([head, row(["---"] * 5), *rows])]
    return "\n\n".join(lines)


def verdict(question: Question, sides: dict[str, list[str]], names: list[str]) -> str:
    """One sentence: who is ahead beyond the seeds' ranges, in which figures."""
    better, worse, neither = (", ".join(sides[key]) for key in ("better", "worse", "neither"))
    if not better and not worse:
        return f"**{question.neither}**: the ranges overlap in every figure."
    if better and worse:
        text = f"**Mixed**: {names[0]} is ahead in {better}, {names[1]} in {worse}"
    elif better:
        text = f"**{question.better}**: {names[0]} is ahead of {names[1]} in {better}"
    else:
        text = f"**{question.worse}**: {names[1]} is ahead of {names[0]} in {worse}"
    return text + (f"; the ranges overlap in {neither}." if neither else ".")


def protocol(runs: Runs) -> str:
    """What was run, for how long, on what."""
    lines = []
    everything = [run for found in runs.values() for run in found]
    for model, title in TITLES.items():
        mine = [run for run in everything if run.member.model == model]
        for size in sorted({run.batch_size for run in mine}):
            alike = [run for run in mine if run.batch_size == size]
            trained, evaluated = (
                fmean(run.summary[f"{kind}_seconds"] for run in alike)
                for kind in ("training", "evaluation")
            )
            lines.append(
                f"- {title}, batch size {size}: {alike[0].summary['steps']} steps, "
                f"{alike[0].summary['steps'] * size:,} images a domain, "
                f"{len(alike[0].evaluations)} evaluations; on average {trained:.0f} s of training "
                f"and {evaluated:.0f} s of evaluation."
            )
    devices = sorted({run.summary["device"] for run in everything})
    version = everything[0].summary["versions"]["torch"]
    return "\n".join([*lines, f"- {'; '.join(devices)} a run, torch {version}."])


def fill(text: str) -> str:
    return textwrap.fill(text, 120)


def report(runs: Runs, absent: list[str], pictures: dict[str, list[Path]], out: Path) -> str:
    total = len(members()) * len(SEEDS)
    done = sum(len(found) for found in runs.values())
    parts = [
        "# Norm study",
        fill(
            "Every norm in both tasks, on the embedded data, with the models' own configurations "
            "but for the norm, the batch size, the length and the loss "
            f"({', '.join(f'{TITLES[model]}: {loss}' for model, loss in LOSS.items())}). Made by"
        ),
        f"```bash\n{COMMANDS}\n```",
        fill(
            f"Runs: {done} of {total}. All runs of a task and batch size see the same number of "
            "images, chosen so that every run takes about the same time. They are short: the "
            "norms' first minute, not their last word. Figures are of the averaged generators on "
            "the features of the embedded classifier (README), at the last evaluation: mean over "
            "the seeds ± half the distance between the lowest and the highest."
        ),
        protocol(runs) + f"\n- Reported on: {device_name('cpu').rpartition(',')[0]}.",
        "## Answers",
        "A difference counts where the ranges of the seeds do not overlap.",
        *(answer(question, runs) for question in QUESTIONS),
    ]
    for model, title in TITLES.items():
        parts += [f"## {title}"]
        if model not in pictures:
            parts += ["No finished runs."]
            continue
        parts += [table(model, runs)]
        for path in pictures[model]:
            what = path.stem.removeprefix(f"{model}_")
            parts += [f"![{title}: {what}]({path.relative_to(out.parent).as_posix()})"]
    if absent:
        parts += ["## Absent runs", "\n".join(f"- {line}" for line in absent)]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norm_study", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs") / FOLDER)
    parser.add_argument("--out", type=Path, default=Path("docs/norm_study.md"), metavar="FILE.md")
    args = parser.parse_args(argv)
    from benchmarks.norm_study_plots import draw

    runs, absent = read(args.folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw(runs, args.out.with_suffix(""))
    args.out.write_text(report(runs, absent, pictures, args.out), encoding="utf-8")
    for line in absent:
        print(f"absent: {line}")
    print(args.out)


if __name__ == "__main__":
    with answering_requests():
        main()
