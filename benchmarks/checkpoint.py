"""What a checkpoint's digest costs.

    python -m benchmarks.checkpoint

A save is written, sealed and synced to the disk (--folder: which one); a load is checked first.
Medians over rounds, of the default CycleGAN and of 300 MB in 75 tensors.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from gannorm.commands.composition import CONF
from gannorm.config import typed
from gannorm.tasks import build_task
from gannorm.training import checkpoint, seal
from gannorm.training.run import Run


def default_cyclegan() -> dict[str, Any]:
    """Its state with optimizers that have taken a step."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = typed(compose("config"))
    cfg.data.global_batch_size = cfg.data.batch_size
    task = build_task(cfg, torch.device("cpu"), None)
    batch = [{"image": torch.rand(8, 3, *cfg.data.size) * 2 - 1} for _ in "AB"]
    task.train_step([batch] * task.batches_per_step)
    return Run(task, {}).state_dict()


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cost(content: dict[str, Any], path: Path, rounds: int) -> dict[str, float]:
    """Megabytes; seconds of a save, the seal in it, a load, the check in it."""
    sealing: list[float] = []
    sealed = seal.seal
    seal.seal = lambda file: sealing.append(seconds(lambda: sealed(file)))
    try:
        saves = [seconds(lambda: checkpoint.save(path, content)) for _ in range(rounds)]
    finally:
        seal.seal = sealed
    loads = [seconds(lambda: checkpoint.load(path)) for _ in range(rounds)]
    checks = [seconds(lambda: checkpoint.fault_of(path)) for _ in range(rounds)]
    each = {"save": saves, "seal": sealing, "load": loads, "check": checks}
    return {"MB": path.stat().st_size / 1e6} | {k: statistics.median(v) for k, v in each.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--folder", default=tempfile.gettempdir())
    arguments.add_argument("--rounds", type=int, default=9)
    chosen = arguments.parse_args()
    large = {str(k): torch.randn(1_000_000) for k in range(75)}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        for name, content in (("default CycleGAN", default_cyclegan()), ("large", large)):
            found = cost(content, Path(folder) / "x.pt", chosen.rounds)
            times = ", ".join(f"{k} {1e3 * v:.1f} ms" for k, v in found.items() if k != "MB")
            share = found["seal"] / found["save"]
            print(f"{name}, {found['MB']:.0f} MB: {times}; the seal is {share:.1%} of the save")


if __name__ == "__main__":
    main()
