"""Time one training step of both tasks, part by part.

    python -m benchmarks.step
    python -m benchmarks.step --peer cut|mimicry|biggan CHECKOUT [OVERRIDE ...]

The second holds the step against a peer's own one (`benchmarks.against`). The first takes the
default configs on their embedded data; on a GPU the published recipes too, on random images of the
recipes' shapes. Compared are networks of equal weights that differ in their norms alone:

    ours      norm.backend=auto
    torch     norm.backend=torch, the fallback; on a GPU, where auto means Triton
    unfused   torch.nn.functional's norm, activation and addition as separate operations

The first losses of all must agree, or the command exits with 1. Parts (the device is waited for
behind each): data, everything up to the optimizer's step of the generators (G) and of the
discriminators (D), EMA. images/s is measured apart, without waiting inside a step.
"""

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import timing
from gannorm import BatchNorm2d, ConditionalBatchNorm2d, GroupNorm, InstanceNorm2d
from gannorm.config import typed
from gannorm.data import Batch, batches, build_data
from gannorm.errors import answering_requests
from gannorm.norms.base import NoNorm
from gannorm.schema import Config, CycleGANConfig
from gannorm.tasks import Task, build_task
from gannorm.tasks.graph import GraphedStep
from gannorm.training.arithmetic import arithmetic
from gannorm.training.options import prepare, stepping

CONF = Path(__file__).resolve().parents[1] / "conf"
DEFAULTS = {"cyclegan": "model=cyclegan", "resblock_gan": "model=resblock_gan"}
RECIPES = ("cyclegan_horse2zebra", "sngan_cifar10", "biggan_cifar10")
AGREE = 0.02  # first losses, relative: an optimizer's step lies between some of them
Losses = dict[str, float]


def configured(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", list(overrides)))


def unfused(norm: Any, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The layer's forward pass as the operations that torch has for it."""
    if isinstance(norm, InstanceNorm2d):
        y = F.instance_norm(x, None, None, norm.weight, norm.bias, eps=norm.eps)
    elif isinstance(norm, GroupNorm):
        y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    else:
        table = isinstance(norm, ConditionalBatchNorm2d)
        weight, bias = (None, None) if table else (norm.weight, norm.bias)
        y = F.batch_norm(
            x, norm.running_mean, norm.running_var, weight, bias, norm.training, norm.momentum,
            norm.eps,
        )  # fmt: skip
        if table:
            gain, shift = norm.weight[labels], norm.bias[labels]
            y = y * gain[:, :, None, None] + shift[:, :, None, None]
    e = norm.epilogue
    behind = NoNorm(e.activation, e.negative_slope, e.residual_after_activation)
    return behind(y, residual=kwargs.get("residual"))


def unfuse(task: Task) -> Task:
    """Every norm of the trained networks without its kernel."""
    kinds = (InstanceNorm2d, BatchNorm2d, GroupNorm, ConditionalBatchNorm2d)
    for net in task.networks.values():
        for module in net.modules():
            if isinstance(module, kinds):
                module.forward = partial(unfused, module)  # type: ignore[method-assign]
    return task


def random_batches(cfg: Config) -> Iterator[list[Batch]]:
    """One batch of random images in [-1, 1] over and over: the recipe's shapes without its data."""
    n, domains = cfg.data.batch_size, 2 if isinstance(cfg.model, CycleGANConfig) else 1
    batch = [
        {"image": torch.rand(n, c, *cfg.data.size) * 2 - 1, "label": torch.arange(n) % 10}
        for c in cfg.data.channel_pair[:domains]
    ]
    while True:
        yield batch


class Trained:
    """One contestant: a task and its batches."""

    def __init__(
        self,
        name: str,
        overrides: list[str],
        device: str,
        synthetic: bool,
    ) -> None:
        held = _memory(device)
        backend = ["norm.backend=torch"] if name == "torch" else []
        cfg = configured(*overrides, f"trainer.device={device}", *backend)
        data = None if synthetic else build_data(cfg.data)
        torch.manual_seed(0)
        self.task = build_task(cfg, torch.device(device), data.num_classes if data else 10)
        if name == "unfused":
            unfuse(self.task)
        prepare(self.task)
        self.take = stepping(self.task)
        self.batches = (
            random_batches(cfg) if data is None
            else batches(data.domains, batch_size=cfg.data.batch_size, start=0, stop=2**30, seed=0)
        )  # fmt: skip
        self.images = cfg.data.batch_size * self.task.batches_per_step
        self.device, self.parts, self.since = device, dict[str, float](), 0.0
        self.timed = False
        for part, optimizer in self.task.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, part=part: self.stamp(part))
        for seed in (random.seed, torch.manual_seed):
            seed(0)
        # Losses alone: half precision moves a share of few values by one of them.
        self.first = {k: float(v) for k, v in self.step().items() if "/" not in k}
        while isinstance(self.take, GraphedStep) and self.take.graph is None:
            self.step()  # until the pools are full
        if held is not None:
            torch.cuda.reset_peak_memory_stats()
            self.step()
        self.peak_bytes = None if held is None else torch.cuda.max_memory_allocated() - held

    def stamp(self, part: str) -> None:
        """The time since the last stamp was this part's."""
        if not self.timed or isinstance(self.take, GraphedStep):  # nothing stops inside a graph
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.since
        self.since = now

    def step(self) -> dict[str, Tensor]:
        self.parts, self.since = {}, time.perf_counter()
        taken = [next(self.batches) for _ in range(self.task.batches_per_step)]
        self.stamp("data")
        task = self.task
        with arithmetic(task.cfg.trainer, task.device), task.norm_backend():
            losses = self.take(taken)
        self.stamp("rest")
        self.task.update_averages(10**9)
        self.stamp("EMA")
        return losses


def _memory(device: str) -> int | None:
    """Bytes allocated on a GPU, from where its peak is counted on."""
    if device != "cuda":
        return None
    gc.collect()  # or the last contestants go in the middle of this one's first step
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure(
    name: str,
    overrides: list[str],
    device: str,
    synthetic: bool,
    steps: int,
    names: Sequence[str] = ("ours", "unfused"),
    how: Sequence[str] = (),
) -> dict[str, Any]:
    """Medians of the contestants `names` of a config, which take turns.

    how: overrides of ours alone, of how a step is computed.
    """
    trained = {
        who: Trained(who, [*overrides, *(how if who == "ours" else ())], device, synthetic)
        for who in names
    }
    parts: dict[str, list[dict[str, float]]] = {who: [] for who in names}
    rates: dict[str, list[float]] = {who: [] for who in names}
    for _ in tqdm(range(steps), desc=name, unit="round"):
        for who, run in trained.items():
            began = _now(device)
            run.step()
            run.step()
            rates[who].append(2 * run.images / (_now(device) - began))
            run.timed = True
            run.step()
            run.timed = False
            parts[who].append(run.parts)
    medians = {
        who: {part: 1000 * statistics.median(p.get(part, 0.0) for p in taken) for part in taken[0]}
        for who, taken in parts.items()
    }
    task = trained["ours"].task
    return {
        "name": name,
        "data": "random images" if synthetic else task.cfg.data.name,
        "batch": task.cfg.data.batch_size,
        "precision": task.cfg.trainer.precision,
        "first_losses": {who: run.first for who, run in trained.items()},
        "peak_bytes": {who: run.peak_bytes for who, run in trained.items()},
        "parts_ms": medians,
        "images_per_second": {who: statistics.median(found) for who, found in rates.items()},
    }


def photographs(folder: Path, count: int) -> Path:
    """Two domains of `count` JPEG files each, 640x480 pixels, as a camera makes them."""
    chance = np.random.default_rng(0)
    for domain in ("trainA", "trainB"):
        (folder / domain).mkdir(parents=True)
        for number in range(count):
            coarse = chance.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
            image.save(folder / domain / f"{number}.jpg", quality=90)
    return folder


def data_speeds(quick: bool) -> dict[str, float]:
    """Images/s of the data alone: what the default trainings and photographs are fed with."""
    with tempfile.TemporaryDirectory() as place:
        root = photographs(Path(place) / "photographs", 8 if quick else 64)
        pair = ["data=folder_pair", f"data.root={root}", f"metrics.cache={place}"]
        kinds = {name: [choice] for name, choice in DEFAULTS.items()} | {
            "photographs, decoded each time": [*pair, "data.cache_gb=0", "data.num_workers=0"],
            "photographs, decoded by 2 workers": [*pair, "data.cache_gb=0", "data.num_workers=2"],
            "photographs, kept": [*pair, "data.num_workers=0"],
        }
        return {
            name: _data_speed(configured(*overrides), quick) for name, overrides in kinds.items()
        }


def _data_speed(cfg: Config, quick: bool) -> float:
    stop = 4 if quick else max(20, 400 // cfg.data.batch_size)
    domains = build_data(cfg.data).domains
    taken = batches(
        domains, batch_size=cfg.data.batch_size, start=0, stop=stop, seed=0,
        num_workers=cfg.data.num_workers,
    )  # fmt: skip
    next(taken)  # workers have started
    began = time.perf_counter()
    rest = sum(len(each["image"]) for batch in taken for each in batch)
    return rest / (time.perf_counter() - began)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def disagreement(first: dict[str, Losses], agree: float = AGREE) -> str:
    """Which contestant's first losses are not those of the unfused network; empty if all are."""
    return ", ".join(
        f"{who}: {key} is {losses[key]:.4g}, unfused {expected:.4g}"
        for who, losses in first.items()
        for key, expected in first["unfused"].items()
        if not abs(losses[key] - expected) <= agree * max(abs(expected), 0.1)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one round of each config")
    parser.add_argument("--peer", nargs=2, metavar=("NAME", "CHECKOUT"), help="beside its step")
    parser.add_argument("--rounds", type=int, default=20, help="of --peer; 20 by default")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of --peer: how ours runs")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    timing.use_device(args.device)
    if args.overrides and not args.peer:
        parser.error(f"{args.overrides[0]}: overrides go with --peer")
    if args.peer:
        from benchmarks import against  # which takes this module's Trained

        name, checkout = args.peer
        rounds = 1 if args.quick else args.rounds
        against.run(name, Path(checkout), args.device, rounds, args.overrides, args.out)
        return 0
    todo = [(name, [choice], False) for name, choice in DEFAULTS.items()]
    if args.device == "cuda" and not args.quick:
        todo += [(name, [f"experiment={name}"], True) for name in RECIPES]
    result = timing.environment(args.device) | {
        "protocol": "medians; contestants take turns, 2 steps timed together, 1 in parts",
        "data_images_per_second": data_speeds(args.quick),
        "steps": [],
    }
    path = timing.result_path(result, args.out, "step-")
    failed = False
    print(result["device"])
    for kind, rate in result["data_images_per_second"].items():
        print(f"data alone, {kind}: {rate:.0f} images/s")
    for name, overrides, synthetic in todo:
        names = ("ours", "torch", "unfused") if args.device == "cuda" else ("ours", "unfused")
        row = measure(name, overrides, args.device, synthetic, 1 if args.quick else 20, names)
        result["steps"].append(row)
        timing.write(result, path)
        print(f"{name}: batch {row['batch']}, {row['precision']}, {row['data']}")
        for who, rate in row["images_per_second"].items():
            words = "  ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"][who].items())
            print(f"    {who:8} {rate:8.1f} images/s   ms: {words}")
        if fault := disagreement(row["first_losses"]):
            failed = True
            print(f"{name}: the first losses differ: {fault}", file=sys.stderr)
    print(path)
    return int(failed)


if __name__ == "__main__":
    with answering_requests():
        sys.exit(main())
