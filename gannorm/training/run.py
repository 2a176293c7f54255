"""Everything that changes while a run goes on, and what becomes of it in a checkpoint."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gannorm import parallel
from gannorm.data import Batch
from gannorm.errors import RequestError
from gannorm.metrics.best import Best
from gannorm.metrics.evaluation import Evaluation
from gannorm.schema import Config
from gannorm.tasks import Evaluator, Task
from gannorm.training import checkpoint
from gannorm.training.memory import telling_of_memory
from gannorm.training.nonfinite import Skips, finite, skips
from gannorm.training.options import eagerly
from gannorm.training.report import versions
from gannorm.training.watch import Watch

BEST = Path("checkpoints") / "best.pt"


@dataclass
class Run:
    """config: as composed, for the checkpoints; due: the evaluation of this step is not made."""

    task: Task
    config: dict[str, Any]
    watch: Watch = field(default_factory=Watch)
    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all resumes
    evaluation_seconds: float = 0.0
    best: Best = field(default_factory=Best)
    due: bool = False
    skipped: int = 0  # steps, for losses or gradients that were not finite
    saved: Path | None = None  # the newest checkpoint that is known to be whole
    saved_step: int = -1  # of it, if it is in the run folder
    notes: dict[str, Any] = field(default_factory=dict)  # that go with the next figures
    taken: list[list[Batch]] = field(default_factory=list)  # the last step's batches

    def __post_init__(self) -> None:
        images = self.cfg.data.whole_batch * self.task.batches_per_step
        self.meter = Meter(images, skips(self.cfg))

    @property
    def cfg(self) -> Config:
        return self.task.cfg

    @property
    def seed(self) -> int:
        """Of batches and noise: behind a rewind they are others."""
        return (self.cfg.seed + 0x9E3779B9 * self.task.halvings) % 2**32

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "best": asdict(self.best),
            "due": self.due,
            "skipped": self.skipped,
            "meter": self.meter.state_dict(),
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
        self.due, self.skipped = state.get("due", False), state.get("skipped", 0)  # older: none
        self.meter.load_state_dict(state.get("meter", {}), self.task.device)
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

        def look() -> tuple[Path | None, bool]:
            whole = (f for f in checkpoint.newer(run_dir, path) if checkpoint.fault_of(f) is None)
            return next(whole, None), checkpoint.is_whole(run_dir / BEST)

        newest, has_best = parallel.from_first(look)
        if newest is not None:
            raise RequestError(
                f"{run_dir} has a checkpoint {newest.name} of its own; go on from that one with "
                f"resume=auto, or from {path} in another folder (hydra.run.dir=)"
            )
        self.load_state_dict(state)
        self.saved = path
        if path.resolve().parent == (run_dir / "checkpoints").resolve():
            self.saved_step = self.step
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
        task.schedule_cap = last / old["optim"]["lr_g"] * 2**task.halvings
        if task.schedule_cap >= 0.5:
            return []
        return [
            f"the learning rates stay below {task.schedule_cap:.1%} of optim.lr_g and optim.lr_d, "
            "where the run left them; optim.restart=true begins a new schedule, "
            "optim.lr_g= and optim.lr_d= set other rates"
        ]

    def rewind(self, state: dict[str, Any]) -> None:
        """Back to `state`, a checkpoint of this run, with half the learning rates of now.

        Batches and noise are drawn anew: the same ones lead to the same place. (PaLM, Chowdhery et
        al., 2022, section 5.1, skips the batches around a spike, which did no harm elsewhere;
        OPT-175B, Zhang et al., 2022, section 2.5, lowers the rate.) The best is still the best.
        """
        halvings, best = self.task.halvings + 1, self.best
        self.load_state_dict(state)
        self.task.halvings, self.best = halvings, best
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.seed)
        self.task.set_learning_rates(self.step)  # which the checkpoint holds

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What happens inside leaves training as it was, but for the time."""
        began = time.perf_counter()
        lacking = telling_of_memory(self.cfg, self.task.device, evaluating=True)
        rng, eager = parallel.forked_rng(), eagerly(self.task)
        with lacking, rng, eager, self.task.norm_backend():
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

    def check_finite(self) -> None:
        """Before a checkpoint, which would hold the sums of losses that no log has shown yet.

        Raises:
            NotFinite: one is NaN or infinite.
        """
        finite(self.meter.means(), self.step, self.task, self.taken)

    def check_replicas(self) -> None:
        """Refuse to go on with networks that are no longer the same in all processes.

        Raises:
            RuntimeError: naming the first tensor that differs.
        """
        where = self.task.replicas_differ() if parallel.world() > 1 else None
        if where is not None:
            raise RuntimeError(
                f"at step {self.step} {where} is not the first process's: the processes train "
                "different networks. A faulty GPU or memory does that, and so does a part of one's "
                "own that draws random numbers by itself; the checkpoints before this step are the "
                "first process's"
            )

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
    """Averages of the losses since the last reading, kept on the device until then.

    skips: what finds the steps that are left out of them, if any are.
    """

    def __init__(self, images_per_step: int, skips: Skips | None = None) -> None:
        self.images_per_step, self.skips = images_per_step, skips
        self.sums: dict[str, torch.Tensor] = {}
        self.steps, self.timed, self.seconds = 0, 0, 0.0
        self.skipped, self.row = 0, 0  # at the last reading: since the one before, and in a row

    def add(self, losses: dict[str, torch.Tensor], seconds: float) -> None:
        if self.skips is not None:
            losses = self.skips.left_out(losses)
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.timed += 1
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        """Over the processes' steps that were not left out."""
        means = parallel.means(list(self.sums.values()))
        counted = self.steps - (0.0 if self.skips is None else self.skips.mean())
        return {
            name if "/" in name else f"loss/{name}": float(value) / counted
            for name, value in zip(self.sums, means, strict=True)
            if counted
        }

    def read(self) -> dict[str, float]:
        """`means`, and how fast it went; what follows begins anew."""
        began = time.perf_counter()
        figures = self.means()
        self.skipped, self.row = (0, 0) if self.skips is None else self.skips.read()
        self.seconds += time.perf_counter() - began  # a GPU catches up here
        figures["speed/images_per_second"] = self.timed * self.images_per_step / self.seconds
        self.sums, self.steps, self.timed, self.seconds = {}, 0, 0, 0.0
        return figures

    def share(self) -> None:
        """What all processes have so far becomes the same, for the one that saves it."""
        self.sums = dict(zip(self.sums, parallel.means(list(self.sums.values())), strict=True))
        if self.skips is not None:
            self.skips.share()

    def state_dict(self) -> dict[str, Any]:
        counts = None if self.skips is None else self.skips.counts
        return {"sums": dict(self.sums), "steps": self.steps, "skips": counts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state.get("sums", {}).items()}
        self.steps, self.timed, self.seconds = state.get("steps", 0), 0, 0.0
        if self.skips is not None:
            self.skips.counts = state.get("skips")
