"""The training loop: one visible sequence from a config to a finished run folder."""

import json
import math
import os
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import gannorm
from gannorm import checkpoint
from gannorm.config import Config, typed
from gannorm.data import Data, batches, build_data
from gannorm.errors import RequestError
from gannorm.monitor import Monitor
from gannorm.tasks import Task, build_task


@dataclass
class Run:
    """Everything that changes while a run goes on."""

    task: Task
    config: dict[str, Any]
    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all resumes

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.config,
            "num_classes": self.task.num_classes,
            "task": self.task.state_dict(),
            "rng": checkpoint.rng_state(),
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.task.load_state_dict(state["task"])
        checkpoint.set_rng_state(state["rng"])


def train(raw: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Train as the composed config says, into `run_dir`.

    Returns the content of summary.json.

    Raises:
        RequestError: a request that cannot be fulfilled; nothing was written then.
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
        run.load_state_dict(state)
    elif cfg.resume != "auto" and (run_dir / "metrics.jsonl").exists():
        raise RequestError(
            f"{run_dir} already holds a run; continue it with resume=auto, or choose another "
            "folder with hydra.run.dir="
        )
    say(describe(cfg, task, data, run_dir, start_from, run.step))
    monitor = Monitor(run_dir, run.step)
    monitor.text("config", f"```yaml\n{OmegaConf.to_yaml(raw, resolve=True)}\n```")

    # ---- what the figures are held against
    with torch.random.fork_rng(), task.norm_backend():
        task.prepare_evaluation(data)
        reference = task.reference_figures()
        monitor.scalars(run.step, {f"reference/{k}": v for k, v in reference.items()})
        if run.step == 0:
            monitor.images(0, task.samples())

    # ---- train
    steps, per_step = cfg.trainer.steps, task.batches_per_step
    loader = batches(
        data.domains, batch_size=cfg.data.batch_size, start=run.step * per_step,
        stop=steps * per_step, seed=cfg.seed, num_workers=cfg.data.num_workers,
    )  # fmt: skip
    quality: dict[str, float] = {}
    meter = Meter(cfg.data.batch_size * per_step)
    with tqdm(total=steps, initial=run.step, unit="step", dynamic_ncols=True) as bar:
        while run.step < steps:
            began = time.perf_counter()
            rates = task.set_learning_rates(run.step)
            with task.norm_backend():
                losses = task.train_step([next(loader) for _ in range(per_step)])
            task.update_averages(run.step)
            run.step += 1
            meter.add(losses, time.perf_counter() - began)
            run.seconds += time.perf_counter() - began

            last = run.step == steps
            if run.step % cfg.trainer.log_every == 0 or last:
                figures = meter.read()
                check_finite(figures, run.step, cfg)
                figures |= {f"lr/{name}": rate for name, rate in rates.items()}
                monitor.scalars(run.step, figures)
                bar.set_postfix(postfix(figures, quality))
            if run.step % cfg.trainer.eval_every == 0 or last:
                with torch.random.fork_rng(), task.norm_backend():
                    quality = task.evaluate()
                monitor.scalars(run.step, {f"quality/{k}": v for k, v in quality.items()})
            if run.step % cfg.trainer.sample_every == 0 or last:
                with torch.random.fork_rng(), task.norm_backend():
                    monitor.images(run.step, task.samples())
            if run.step % cfg.trainer.checkpoint_every == 0 or last:
                path = run_dir / "checkpoints" / f"step_{run.step:08d}.pt"
                checkpoint.save(path, run.state_dict())
                checkpoint.prune(run_dir, cfg.trainer.keep_checkpoints)
            bar.update()
    monitor.close()

    # ---- report
    if not quality:  # resumed behind the last step
        with torch.random.fork_rng(), task.norm_backend():
            quality = task.evaluate()
    summary = {
        "steps": steps,
        "quality": quality,
        "reference": reference,
        "training_seconds": round(run.seconds, 1),
        "images_per_second": round(steps * per_step * cfg.data.batch_size / run.seconds, 1),
        "device": device_name(device),
        "seed": cfg.seed,
        "versions": versions(),
    }
    write_json(run_dir / "summary.json", summary)
    say(closing(summary, run_dir))
    return summary


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
        figures = {f"loss/{k}": float(v) / self.steps for k, v in self.sums.items()}
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


def check_finite(figures: dict[str, float], step: int, cfg: Config) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} became {value} before step {step}; lower optim.lr_g and optim.lr_d, set "
                f"optim.clip_norm=1, or use a wider trainer.precision than "
                f"{cfg.trainer.precision.name}; checkpoints before this step are kept"
            )


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


def postfix(figures: dict[str, float], quality: dict[str, float]) -> dict[str, str]:
    shown = {k.removeprefix("loss/"): v for k, v in figures.items() if k.startswith("loss/")}
    few = {k: f"{v:.2f}" for k, v in list(shown.items())[:3]}
    return few | {k: f"{v:.2f}" for k, v in quality.items() if k.startswith("accuracy")}


def closing(summary: dict[str, Any], run_dir: Path) -> str:
    lines = []
    for name, value in summary["quality"].items():
        beside = [
            f"{key.removeprefix(name + '_')} {v:.1%}"
            for key, v in summary["reference"].items()
            if key.startswith(name + "_")
        ]
        figure = f"{value:.1%}" if name.startswith("accuracy") else f"{value:.4f}"
        lines.append(f"{name}: {figure}" + (f"  ({', '.join(beside)})" if beside else ""))
    lines += [
        f"{summary['steps']} steps in {summary['training_seconds']:.0f} s "
        f"({summary['images_per_second']:.0f} images/s)",
        f"samples: {run_dir / 'samples'}",
        f"tensorboard --logdir {run_dir}",
    ]
    return "\n".join(lines)


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
