"""The finished runs of the norm study, and their figures over seeds."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy.stats import mannwhitneyu
from yaml import YAMLError

from gannorm.errors import RequestError
from gannorm.metrics.figures import FIGURES, average, base
from gannorm.study.members import Member, members
from gannorm.training.checkpoint import flat

SEEDS = (0, 1, 2)  # of every member; some have more
MANY = 5  # seeds, from which on a test is better than ranges
# Keys that may differ.
OWN = (
    "seed",
    "resume",
    "norm.",
    "trainer.",
    "metrics.cache",
    "data.batch_size",
    "data.global_batch_size",
)
TITLES = {"cyclegan": "CycleGAN", "resblock_gan": "Class-conditional ResBlock GAN"}


@dataclass(frozen=True)
class Column:
    """A figure of quality; a `key` without a direction means the average of both."""

    key: str
    title: str
    group: str = "quality"

    @property
    def higher(self) -> bool:
        return FIGURES[base(self.key)].higher

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


COLUMNS = {
    "cyclegan": (
        Column("accuracy_BtoA", "accuracy B to A"),
        Column("accuracy_AtoB", "accuracy A to B"),
        Column("fid_BtoA", "FID B to A"),
        Column("fid_AtoB", "FID A to B"),
        Column("coverage_BtoA", "coverage B to A"),
        Column("coverage_AtoB", "coverage A to B"),
        Column("cycle_l1", "cycle error (L1)"),
        Column("accuracy_BtoA", "accuracy B to A of the trained weights", "quality_raw"),
        Column("fid_BtoA", "FID B to A of the trained weights", "quality_raw"),
    ),
    "resblock_gan": (
        Column("accuracy", "accuracy"),
        Column("fid", "FID"),
        Column("coverage", "coverage"),
        Column("fid", "FID of the trained weights", "quality_raw"),
    ),
}


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
        data = self.config["data"]
        return data.get("global_batch_size") or data["batch_size"]

    def value(self, column: Column, evaluation: int = -1) -> float | None:
        prefix = f"{column.group}/"
        line = self.evaluations[evaluation]
        return column.of(
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
        raise RequestError(
            f"no finished run of the study in {folder}; first: "
            "python train.py -m seed=0,1,2 'study=glob(*)'"
        )
    for model in TITLES:
        _check_comparable([run for each in runs.values() for run in each
                           if run.member.model == model])  # fmt: skip
    return runs, absent


def _run(member: Member, seed: int, folder: Path) -> Run:
    path = folder / ".hydra" / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(config, dict):
            raise ValueError(config)
        path = folder / "summary.json"
        summary = json.loads(path.read_text("utf-8"))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        # A tag that would run code is an error too.
        raise RequestError(f"{path} is not what a run has written") from error
    lines = _lines(folder)
    evaluations = [line for line in lines if any(key.startswith("quality/") for key in line)]
    return Run(member, seed, folder, summary, {str(k): v for k, v in config.items()}, evaluations)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, but for a last line that a crash cut short."""
    lines = []
    for line in (folder / "metrics.jsonl").open(encoding="utf-8"):
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


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


def apart(one: Spread, two: Spread) -> bool:
    """Whether the seeds tell two spreads apart."""
    if min(len(one.values), len(two.values)) < MANY:
        return not one.overlaps(two)
    return bool(mannwhitneyu(one.values, two.values).pvalue < 0.05)


def spread(runs: Sequence[Run], column: Column, evaluation: int = -1) -> Spread | None:
    values = [run.value(column, evaluation) for run in runs]
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known else None


def label(member: Member) -> str:
    return member.norm + (f", {member.mistake.replace('_0', ' 0')}" if member.mistake else "")
