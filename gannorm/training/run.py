"""Everything that changes while a run goes on, and what becomes of it in a checkpoint."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gannorm import parallel
from gannorm.errors import RequestError
from gannorm.metrics.best import Best
from gannorm.metrics.evaluation import Evaluation
from gannorm.schema import Config
from gannorm.tasks import Evaluator, Task
from gannorm.training import checkpoint
from gannorm.training.report import versions
from gannorm.training.watch import Watch

BEST = Path("checkpoints") / "best.pt"


@dataclass
class Run:
    """config: as composed, for the checkpoints."""

    task: Task
    config: dict[str, Any]
    watch: Watch = field(default_factory=Watch)
    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all resumes
    evaluation_seconds: float = 0.0
    best: Best = field(default_factory=Best)

    @property
    def cfg(self) -> Config:
        return self.task.cfg

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "best": asdict(self.best),
            "config": self.config,
            "num_classes": self.task.num_classes,
            "class_names": self.task.class_names,
            "task": self.task.state_dict(),
            "watch": self.watch.state_dict(),
            "rng": checkpoint.rng_state(),
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.evaluation_seconds = state["evaluation_seconds"]
        self.best = Best(**state["best"])
        self.task.load_state_dict(state["task"])
        self.watch.load_state_dict(state["watch"])
        checkpoint.set_rng_state(state["rng"])

    def resume(self, state: dict[str, Any], path: Path, run_dir: Path) -> list[str]:
        """Go on from `state`, the checkpoint `path`, in `run_dir`: what is to be said of it.

        Raises:
            RequestError: it is of a run that trains something else, or the folder is ahead of it.
        """
        changes = checkpoint.check_same(_whole_batch(state["config"]), self.config, path)
        had, has = state.get("class_names"), self.task.class_names
        if had is not None and had != has:  # a label would mean another class from here on
            gone, new = sorted(set(had) - set(has)), sorted(set(has) - set(had))
            raise RequestError(
                f"cannot continue {path}: the classes of the data have changed since "
                f"(gone: {', '.join(gone) or 'none'}; new: {', '.join(new) or 'none'}); give the "
                "folders their old names back, or start a new run without resume="
            )
        newest, has_best = parallel.from_first(
            lambda: (checkpoint.newest(run_dir), (run_dir / BEST).exists())
        )
        if newest is not None and newest.resolve() != path.resolve():
            raise RequestError(
                f"{run_dir} has a checkpoint {newest.name} of its own; go on from that one with "
                f"resume=auto, or from {path} in another folder (hydra.run.dir=)"
            )
        self.load_state_dict(state)
        changes += self._reschedule(state)
        then, now = (
            {k: v for k, v in each["metrics"].items() if k not in ("cache", "patience")}
            for each in (state["config"], self.config)
        )
        if not has_best or then != now:
            self.best = Best()  # in another folder, or by another figure
        return changes

    def _reschedule(self, state: dict[str, Any]) -> list[str]:
        """Under other steps or another schedule no rate rises, unless `optim.restart` asks for it.

        So that a rate may be corrected, it is the share of `optim.lr_g` that must not rise.
        """
        old, new, task = state["config"], self.config, self.task
        keys = ("schedule", "decay_from")
        same = all(old["optim"].get(k, new["optim"][k]) == new["optim"][k] for k in keys)
        more = old["trainer"]["steps"] != new["trainer"]["steps"]
        if (same and not more) or self.step == 0:
            return []
        if self.cfg.optim.restart:
            task.schedule_start, task.schedule_cap = self.step, 1.0
            return [f"the schedule of the learning rates begins anew at step {self.step}"]
        last = state["task"]["optimizers"]["G"]["param_groups"][0]["lr"]
        task.schedule_cap = last / old["optim"]["lr_g"]
        if task.schedule_cap >= 0.5:
            return []
        return [
            f"the learning rates stay below {task.schedule_cap:.1%} of optim.lr_g and optim.lr_d, "
            "where the run left them; optim.restart=true begins a new schedule, "
            "optim.lr_g= and optim.lr_d= set other rates"
        ]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What happens inside leaves training as it was, but for the time."""
        began = time.perf_counter()
        with parallel.forked_rng(), self.task.norm_backend():
            yield
        self.evaluation_seconds += time.perf_counter() - began

    def evaluate(self, evaluator: Evaluator[Any]) -> tuple[dict[str, dict[str, float]], Evaluation]:
        """By group: `quality` of the averaged generators, of a single class's samples, and
        `quality_raw` of the trained ones, where they differ; and the former's evaluation."""
        with self.evaluating():
            evaluation = evaluator.evaluate(self.task.averaged)
            groups = {"quality": evaluation.figures}
            if self.cfg.optim.ema_decay > 0:
                raw = evaluator.evaluate(self.task.generators, brief=True)
                groups["quality_raw"] = raw.figures
            # What follows from them, all processes do alike.
            groups = parallel.from_first(lambda: groups)
        return groups, evaluation

    @property
    def evaluation_share(self) -> float:
        return self.evaluation_seconds / (self.seconds + self.evaluation_seconds)

    @property
    def finished(self) -> bool:
        """All steps taken, or no better evaluation for `metrics.patience` of them."""
        patience = self.cfg.metrics.patience
        plateaued = patience is not None and self.best.since >= patience
        return self.step >= self.cfg.trainer.steps or plateaued


def _whole_batch(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config with its batch of all processes, which older ones do not name."""
    data = config["data"]
    return {**config, "data": {"global_batch_size": data["batch_size"], **data}}


class Meter:
    """Averages of the losses since the last reading, kept on the device until then."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.sums: dict[str, torch.Tensor] = {}
        self.steps, self.seconds = 0, 0.0

    def add(self, losses: dict[str, torch.Tensor], seconds: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.seconds += seconds

    def read(self) -> dict[str, float]:
        began = time.perf_counter()
        means = parallel.means(list(self.sums.values()))
        figures = {
            name if "/" in name else f"loss/{name}": float(value) / self.steps
            for name, value in zip(self.sums, means, strict=True)
        }
        self.seconds += time.perf_counter() - began  # a GPU catches up here
        figures["speed/images_per_second"] = self.steps * self.images_per_step / self.seconds
        self.sums, self.steps, self.seconds = {}, 0, 0.0
        return figures
