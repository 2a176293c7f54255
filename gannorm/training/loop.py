"""The training loop: one visible sequence from a config to a finished run folder."""

import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import gannorm
from gannorm.config import Config, typed
from gannorm.data import Batch, Data, batches, build_data
from gannorm.diagnostics.faults import balance_faults
from gannorm.diagnostics.nonfinite import first_nonfinite
from gannorm.errors import RequestError
from gannorm.metrics.best import Best, average, unmeasured
from gannorm.metrics.evaluation import Judged
from gannorm.norms import cpu
from gannorm.tasks import Task, build_task
from gannorm.training import checkpoint
from gannorm.training.dashboard import Dashboard, environment
from gannorm.training.monitor import Monitor
from gannorm.training.watch import Watch

BEST = Path("checkpoints") / "best.pt"


@dataclass
class Run:
    """Everything that changes while a run goes on."""

    task: Task
    config: dict[str, Any]
    watch: Watch = field(default_factory=Watch)
    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all resumes
    evaluation_seconds: float = 0.0
    best: Best = field(default_factory=Best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "best": asdict(self.best),
            "config": self.config,
            "num_classes": self.task.num_classes,
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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What happens inside leaves training as it was, but for the time."""
        began = time.perf_counter()
        with torch.random.fork_rng(), self.task.norm_backend():
            yield
        self.evaluation_seconds += time.perf_counter() - began

    def evaluate(self) -> tuple[dict[str, dict[str, float]], Judged]:
        """By group: `quality` of the averaged generators, of a single class's samples, and
        `quality_raw` of the trained ones, where they differ; and what was seen of the former."""
        with self.evaluating():
            judged = self.task.evaluate(self.task.averaged)
            groups = {"quality": judged.figures}
            if self.task.cfg.optim.ema_decay > 0:
                raw = self.task.evaluate(self.task.generators, brief=True)
                groups["quality_raw"] = raw.figures
        return groups, judged

    @property
    def evaluation_share(self) -> float:
        return self.evaluation_seconds / (self.seconds + self.evaluation_seconds)


def train(raw: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Train as the composed config says, into `run_dir`.

    Returns the content of summary.json.

    Raises:
        RequestError: a request that cannot be fulfilled, before anything is written; or images
            that turn out to be unreadable.
        FloatingPointError: a loss became NaN or infinite.
    """
    # ---- check the request, build, resume
    cfg = typed(raw)
    device = pick_device(cfg.trainer.device.name)
    check_pair(cfg)
    start_from = find_resume(cfg.resume, run_dir)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(cfg.seed)
    data = build_data(cfg.data)
    task = build_task(cfg, device, data.num_classes)
    plain = OmegaConf.to_container(raw, resolve=True)
    assert isinstance(plain, dict)
    run = Run(task, {str(k): v for k, v in plain.items()})
    if start_from is not None:
        state = checkpoint.load(start_from)
        checkpoint.check_same(state["config"], run.config, start_from)
        newest = checkpoint.newest(run_dir)
        if newest is not None and newest.resolve() != start_from.resolve():
            raise RequestError(
                f"{run_dir} has a checkpoint {newest.name} of its own; go on from that one with "
                f"resume=auto, or from {start_from} in another folder (hydra.run.dir=)"
            )
        run.load_state_dict(state)
        measured = [
            {k: v for k, v in each["metrics"].items() if k not in ("cache", "patience")}
            for each in (state["config"], run.config)
        ]
        if not (run_dir / BEST).exists() or measured[0] != measured[1]:
            run.best = Best()  # in another folder, or by another figure
    elif cfg.resume != "auto" and (run_dir / "metrics.jsonl").exists():
        raise RequestError(
            f"{run_dir} already holds a run; continue it with resume=auto, or choose another "
            "folder with hydra.run.dir="
        )
    say(describe(cfg, task, data, run_dir, start_from, run.step))
    if device.type == "cpu":
        cpu.keep_memory()
        cpu.kernels()  # compiled now, if ever: not while something is timed

    # ---- what the figures are held against
    with run.evaluating():
        task.prepare_evaluation(data)
        reference = task.reference_figures()
    missing = unmeasured(cfg, data)
    if missing is not None:
        say(f"{missing}; there will be no best.pt")
    protocol = task.protocol()
    monitor = Monitor(run_dir, run.step)
    monitor.text("config", f"```yaml\n{OmegaConf.to_yaml(raw, resolve=True)}\n```")
    monitor.text("protocol", f"```yaml\n{OmegaConf.to_yaml(protocol)}\n```")
    monitor.text("environment", environment(device_name(device)))
    monitor.scalars(run.step, tagged("reference", reference), protocol=protocol)
    board = Dashboard(monitor, task, tagged("reference", reference))
    if run.step == 0:
        with run.evaluating():
            monitor.images(0, task.samples())

    # ---- train
    steps, per_step = cfg.trainer.steps, task.batches_per_step
    loader = batches(
        data.domains, batch_size=cfg.data.batch_size, start=run.step * per_step,
        stop=steps * per_step, seed=cfg.seed, num_workers=cfg.data.num_workers,
    )  # fmt: skip
    groups: dict[str, dict[str, float]] = {}
    figures: dict[str, float] = {}
    meter = Meter(cfg.data.batch_size * per_step)
    with tqdm(total=steps, initial=run.step, unit="step", dynamic_ncols=True) as bar:
        while run.step < steps and not plateaued(run, cfg):
            began = time.perf_counter()
            rates = task.set_learning_rates(run.step)
            with task.norm_backend():
                taken = [next(loader) for _ in range(per_step)]
                losses = task.train_step(taken)
            task.update_averages(run.step)
            run.step += 1
            meter.add(losses, time.perf_counter() - began)
            run.seconds += time.perf_counter() - began

            last = run.step == steps
            evaluated = run.step % cfg.trainer.eval_every == 0 or last
            if run.step % cfg.trainer.log_every == 0 or evaluated:
                began = time.perf_counter()
                figures = meter.read()  # waits for a GPU
                run.seconds += time.perf_counter() - began
                figures = finite(figures, run.step, task, taken, monitor)
                figures |= {f"lr/{name}": rate for name, rate in rates.items()}
                figures |= run.watch.report(run.step, balance_faults(figures), monitor)
                monitor.scalars(run.step, figures)
                bar.set_postfix(postfix(figures, groups, run))
            if evaluated:
                groups = assess(run, cfg, monitor, board)
                bar.set_postfix(postfix(figures, groups, run))
                last = last or plateaued(run, cfg)
            if run.step % cfg.trainer.sample_every == 0 or last:
                with run.evaluating():
                    monitor.images(run.step, task.samples())
            if run.step % cfg.trainer.checkpoint_every == 0 or last:
                path = run_dir / "checkpoints" / f"step_{run.step:08d}.pt"
                checkpoint.save(path, run.state_dict())
                checkpoint.prune(run_dir, cfg.trainer.keep_checkpoints)
            bar.update()

    # ---- report
    groups = groups or run.evaluate()[0]  # resumed behind the last step
    board.compare(run.config, groups["quality"])
    monitor.close()
    summary = {
        "steps": run.step,
        **groups,
        "reference": reference,
        "protocol": protocol,
        "best": {"figure": cfg.metrics.best.name, "value": run.best.value, "step": run.best.step},
        "training_seconds": round(run.seconds, 1),
        "evaluation_seconds": round(run.evaluation_seconds, 1),
        "images_per_second": round(run.step * per_step * cfg.data.batch_size / run.seconds, 1),
        "device": device_name(device),
        "seed": cfg.seed,
        "versions": versions(),
    }
    write_json(run_dir / "summary.json", summary)
    say(closing(summary, run_dir))
    return summary


def assess(
    run: Run, cfg: Config, monitor: Monitor, board: Dashboard
) -> dict[str, dict[str, float]]:
    """Diagnose, evaluate, log, keep best.pt: the figures of quality by group."""
    with run.evaluating():
        figures, faults = run.task.diagnose()
    figures |= run.watch.report(run.step, faults, monitor)
    groups, judged = run.evaluate()
    for group, values in groups.items():
        figures |= tagged(group, values)
    figures["speed/evaluation_share"] = run.evaluation_share
    monitor.scalars(run.step, figures, protocol=run.task.protocol())
    with run.evaluating():
        board.show(run.step, judged)
    if run.best.update(cfg.metrics.best.name, groups["quality"], run.step):
        checkpoint.save(monitor.run_dir / BEST, run.state_dict())
    return groups


def tagged(group: str, figures: dict[str, float]) -> dict[str, float]:
    """group/figure; what is a single class's (class_fid/3) is shown of `quality` alone."""
    out = {f"{group}/{name}": v for name, v in figures.items() if "/" not in name}
    return out | ({k: v for k, v in figures.items() if "/" in k} if group == "quality" else {})


def plateaued(run: Run, cfg: Config) -> bool:
    return cfg.metrics.patience is not None and run.best.since >= cfg.metrics.patience


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
        figures = {
            name if "/" in name else f"loss/{name}": float(value) / self.steps
            for name, value in self.sums.items()
        }
        self.seconds += time.perf_counter() - began  # a GPU catches up here
        figures["speed/images_per_second"] = self.steps * self.images_per_step / self.seconds
        self.sums, self.steps, self.seconds = {}, 0, 0.0
        return figures


# ---- requests


def check_pair(cfg: Config) -> None:
    """Refuse a model on data of the wrong kind, before any file is read."""
    fitting = {
        "cyclegan": ("digits_m", "folder_pair"),
        "resblock_gan": ("digits", "image_folder", "cifar10", "mnist"),
    }[cfg.model.name]
    if cfg.data.name not in fitting:
        raise RequestError(
            f"data={cfg.data.name} cannot train model={cfg.model.name}; "
            f"choose data= {', '.join(fitting)}"
        )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "trainer.device=cuda: no GPU was found; use trainer.device=auto or trainer.device=cpu"
        )
    return torch.device(name)


def find_resume(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to go on from: auto means the newest in the run folder, if there is one."""
    if resume is None:
        return None
    if resume == "auto":
        return checkpoint.newest(run_dir)
    return checkpoint.resolve(Path(resume))


def run_folder(family: str, now: str, resume: str | None) -> str:
    """Where a run goes: a new folder below `family`, or the folder of the run it continues.

    resume=auto continues the family's newest unfinished run, resume=FOLDER that run; from a
    checkpoint file a new run starts, so that nothing behind that step is overwritten.
    """
    if resume == "auto":
        for folder in sorted(Path(family).glob("*"), reverse=True):
            if checkpoint.newest(folder) and not (folder / "summary.json").exists():
                return str(folder)
    elif resume is not None and Path(resume).is_dir():
        return resume
    return f"{family}/{now}"


def finite(
    figures: dict[str, float], step: int, task: Task, taken: list[list[Batch]], monitor: Monitor
) -> dict[str, float]:
    """The figures; less gradients that fp16 skipped to find its loss scale.

    Raises:
        FloatingPointError: any other that is NaN or infinite. No weight is, since `_descend` leaves
            them; so `taken`, the last batches, run again show where it begins.
    """
    precision = task.cfg.trainer.precision.name
    bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
    if precision == "fp16":
        bad = {name: value for name, value in bad.items() if name.startswith("loss/")}
    if bad:
        name, value = next(iter(bad.items()))
        with task.norm_backend():
            place = first_nonfinite(task.networks, lambda: task.train_step(taken))
        where = f"first in {place}" if place else "with every layer finite when run again"
        text = f"{name} became {value} before step {step}, {where}"
        monitor.scalars(step, {"health/not_finite": 1.0})
        monitor.text("health/not_finite", text, step)
        monitor.close()
        raise FloatingPointError(
            f"{text}; lower optim.lr_g and optim.lr_d, set optim.clip_norm=1, or use a wider "
            f"trainer.precision than {precision}; checkpoints before this step are kept"
        )
    kept = {name: value for name, value in figures.items() if math.isfinite(value)}
    return {**kept, "health/not_finite": 0.0}


# ---- words


def say(text: str) -> None:
    tqdm.write(text)


def describe(
    cfg: Config, task: Task, data: Data, run_dir: Path, start_from: Path | None, step: int
) -> str:
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in net.parameters()):,}"
        for name, net in task.networks.items()
    )
    samples = " + ".join(f"{len(source):,}" for source in data.domains)
    lines = [
        f"{cfg.model.name}, norm {cfg.norm.name}, data {cfg.data.name} ({samples} images), "
        f"{device_name(task.device)}, {cfg.trainer.precision.name}",
        f"parameters: {sizes}",
        f"run folder: {run_dir}",
    ]
    if start_from is not None:
        lines.append(f"continued from {start_from} at step {step}")
    return "\n".join(lines)


def postfix(
    figures: dict[str, float], groups: dict[str, dict[str, float]], run: Run
) -> dict[str, str]:
    losses = {k.removeprefix("loss/"): v for k, v in figures.items() if k.startswith("loss/")}
    few = {k: f"{v:.2f}" for k, v in list(losses.items())[:3]}
    quality = groups.get("quality", {})
    for name in ("fid", "accuracy"):
        value = average(name, quality)
        few |= {} if value is None else {name: f"{value:.3g}"}
    return few | {"evaluation": f"{run.evaluation_share:.0%} of the time"}


def closing(summary: dict[str, Any], run_dir: Path) -> str:
    lines = []
    for name, value in summary["quality"].items():
        if "/" in name:  # a single class's
            continue
        beside = [
            f"{key.removeprefix(name + '_')} {shown(name, v)}"
            for key, v in summary["reference"].items()
            if key.startswith(name + "_")
        ]
        lines.append(
            f"{name}: {shown(name, value)}" + (f"  ({', '.join(beside)})" if beside else "")
        )
    lines += [
        f"{summary['steps']} steps in {summary['training_seconds']:.0f} s "
        f"({summary['images_per_second']:.0f} images/s), "
        f"{summary['evaluation_seconds']:.0f} s of evaluation",
        f"samples: {run_dir / 'samples'}",
        f"tensorboard --logdir {run_dir}",
    ]
    return "\n".join(lines)


def shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name.startswith("accuracy") else f"{value:.4f}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {
        "gannorm": gannorm.__version__,
        "torch": str(torch.__version__),  # a TorchVersion would not load as plain values
        "python": platform.python_version(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
