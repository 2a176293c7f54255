"""What a run says: at its start, beside its bar, at its end, in summary.json."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import gannorm
from gannorm import parallel
from gannorm.data import Data
from gannorm.metrics.figures import FIGURES, average, base
from gannorm.schema import Config
from gannorm.tasks import Task


def say(text: str) -> None:
    if parallel.leads():
        tqdm.write(text)


def tell(text: str) -> None:
    """One line on stderr, above a bar: of what went wrong and does not end the program."""
    if parallel.leads():
        tqdm.write(text, file=sys.stderr)


def describe(
    cfg: Config,
    task: Task,
    data: Data,
    run_dir: Path,
    start_from: Path | None,
    step: int,
    changes: list[str],
) -> str:
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in net.parameters()):,}"
        for name, net in task.networks.items()
    )
    samples = " + ".join(f"{len(source):,}" for source in data.domains)
    lines = [
        f"{cfg.model.name}, norm {cfg.norm.name}, data {cfg.data.name} ({samples} images), "
        f"{device_name(task.device)}, {cfg.trainer.precision}{processes(cfg)}",
        f"parameters: {sizes}",
        f"run folder: {run_dir}",
    ]
    if start_from is not None:
        lines.append(f"continued from {start_from} at step {step}")
        lines += [f"changed: {change}" for change in changes]
        if step >= cfg.trainer.steps:
            lines.append(
                f"all {cfg.trainer.steps} steps are taken; trainer.steps= of more continues the run"
            )
    return "\n".join(lines)


def postfix(
    figures: dict[str, float], groups: dict[str, dict[str, float]], share: float
) -> dict[str, str]:
    losses = {k.removeprefix("loss/"): v for k, v in figures.items() if k.startswith("loss/")}
    few = {k: f"{v:.2f}" for k, v in list(losses.items())[:3]}
    quality = groups.get("quality", {})
    for name in ("fid", "accuracy"):
        value = average(name, quality)
        few |= {} if value is None else {name: f"{value:.3g}"}
    return few | {"evaluation": f"{share:.0%} of the time"}


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
    figure = FIGURES.get(base(name))
    return format(value, ".4f" if figure is None else figure.form)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def processes(cfg: Config) -> str:
    """What is said of them, where there are more than one."""
    each, whole = cfg.data.batch_size, cfg.data.global_batch_size
    count = parallel.world()
    return "" if count == 1 else f", {count} processes, {each} of a batch's {whole} images each"


def versions() -> dict[str, str]:
    return {
        "gannorm": gannorm.__version__,
        "torch": str(torch.__version__),  # a TorchVersion would not load as plain values
        "python": platform.python_version(),
    }
