"""Stages 2 and 5, "run" and "step": whole trainings. They need Hydra, as training does."""

import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from benchmarks import step
from benchmarks.gpu.engine import Context, Result
from benchmarks.gpu.stages import OPTIONAL
from gannorm.config import typed
from gannorm.data import batches, build_data
from gannorm.tasks import build_task
from gannorm.training.loop import train
from gannorm.training.options import stepping

STEPS, COMPARED = 60, 5
BF16 = 0.05  # of first losses, in place of `step.AGREE`: the twin rounds up to three times
# The first step's losses, and those behind the optimizers' first steps: relative, and absolute.
FIRST, LATER = (0.02, 0.02), (0.2, 0.1)
# Of the recipes, and what is done to a network for it; in the order of what is to be known first.
# Overrides of both, and of ours alone: "everything" is what a GPU can do against torch as it is,
# with TF32 in its convolutions.
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "fp32": ([], []),
    "bf16": (["trainer.precision=bf16"], []),
    "everything": (
        ["trainer.precision=tf32"],
        ["trainer.precision=bf16", "trainer.cuda_graph=true"],
    ),
    "tf32+graph": (["trainer.precision=tf32"], ["trainer.cuda_graph=true"]),
    "checkpointing": ([], ["trainer.checkpointing=true"]),
    "compile": (["trainer.compile=true"], []),
}
RECIPES = ("cyclegan_horse2zebra", "sngan_cifar10")
LAST = "biggan_cifar10"
SMALL = {
    "cyclegan": ["model=cyclegan", "model.width=8", "model.blocks=1", "model.d_width=8"],
    "resblock_gan": ["model=resblock_gan", "model.g_widths=[8,8,8,8]", "model.d_widths=[8,8,8,8]"],
}
GRAPHED, GRAPHED_STEPS, CLOSE = " in a graph", 20, 8
# Pools that are full after three steps.
FEW = {"cyclegan": ["data.batch_size=2", "model.pool_size=6"], "resblock_gan": []}


@contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Random numbers come from the CPU's generator, whatever the device: the same everywhere."""

    def moved(draw: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            return draw(*args, **kwargs).to(device)

        return drawn

    draws: dict[str, Any] = {
        name: moved(getattr(torch, name)) for name in ("randn", "randint", "rand")
    }
    with mock.patch.multiple(torch, **draws):
        yield


@contextmanager
def little(rehearsed: bool) -> Iterator[None]:
    """In a rehearsal few digits, read by a classifier of two steps."""
    with ExitStack() as stack:
        if rehearsed:
            from sklearn.datasets import load_digits

            from gannorm.metrics import features

            digits, bunch = import_module("gannorm.data.digits"), load_digits()
            bunch.images, bunch.target = bunch.images[:300], bunch.target[:300]
            stack.enter_context(mock.patch.object(digits, "load_digits", lambda: bunch))
            stack.enter_context(mock.patch.object(features, "STEPS", 2))
        yield


# ---- run


def run_items(context: Context) -> list[str]:
    return [*SMALL, *(f"{name}{GRAPHED}" for name in SMALL)]


def shortened(name: str, steps: int, context: Context) -> list[str]:
    """A default training of `steps` steps, each of them logged."""
    every = [f"trainer.{what}_every={steps}" for what in ("eval", "sample", "checkpoint")]
    which = SMALL[name] if context.rehearsed else SMALL[name][:1]
    return [*which, f"trainer.steps={steps}", "trainer.log_every=1", *every]


def run_run(name: str, context: Context) -> Result:
    """A default training through `train`: its first losses beside the CPU's, its speed."""
    if name.endswith(GRAPHED):
        return in_a_graph(name.removesuffix(GRAPHED), context)
    folder, steps = context.out / "run" / name, 3 if context.rehearsed else STEPS
    overrides = shortened(name, steps, context)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's: `train` would not overwrite it
    compared = min(COMPARED, steps)
    with initialize_config_dir(str(step.CONF), version_base="1.3"):
        raw, beside = (
            compose("config", [*overrides, f"trainer.device={device}"])
            for device in (context.device, "cpu")
        )
    with drawn_on_the_cpu(), little(context.rehearsed):
        summary = train(raw, folder)
        expected = first_losses(beside, compared)
    found, speed = logged(folder, compared)
    return {
        "wrong": disagreement(found, expected),
        "images_per_second": speed,
        "seconds": summary["training_seconds"],
        "losses": found,
        "losses_cpu": expected,
        "quality": summary["quality"],
    }


def in_a_graph(name: str, context: Context) -> Result:
    """A small training's steps with `trainer.cuda_graph` and without, on the same images."""
    found, began = {}, time.perf_counter()
    for graphed in (False, True):
        overrides = [*SMALL[name], *FEW[name], f"trainer.device={context.device}"]
        cfg = step.configured(*overrides, "trainer.steps=1000", f"trainer.cuda_graph={graphed}")
        torch.manual_seed(0)
        random.seed(0)
        task = build_task(cfg, torch.device(context.device), 10)
        count = GRAPHED_STEPS * task.batches_per_step
        taken = iter([next(step.random_batches(cfg)) for _ in range(count)])  # each another one
        take, losses = stepping(task), []
        torch.manual_seed(1)  # the same noise and choices
        for number in range(GRAPHED_STEPS):
            task.set_learning_rates(number)
            with task.norm_backend():
                each = take([next(taken) for _ in range(task.batches_per_step)])
            task.update_averages(number)
            losses.append({k: float(v) for k, v in each.items() if "/" not in k})
        found[graphed] = losses
    wrong = disagreement(found[True], found[False], "without a graph", CLOSE)
    if wrong == "" and found[True][-1] == found[True][-2]:
        wrong = "a replay repeats the step before"
    return {"wrong": wrong, "seconds": time.perf_counter() - began, "losses": found[True]}


def logged(folder: Path, steps: int) -> tuple[list[dict[str, float]], float]:
    """A run's losses in its first steps, and images/s in its second half."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [line for line in lines if "speed/images_per_second" in line]
    losses = [
        {k.removeprefix("loss/"): v for k, v in line.items() if k.startswith("loss/")}
        for line in logs[:steps]
    ]
    speeds = [line["speed/images_per_second"] for line in logs[len(logs) // 2 :]]
    return losses, statistics.median(speeds)


def first_losses(raw: Any, steps: int) -> list[dict[str, float]]:
    """Of a run's first steps, as `train` makes them."""
    cfg = typed(raw)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(cfg.seed)
    data = build_data(cfg.data)
    task = build_task(cfg, torch.device(cfg.trainer.device), data.num_classes)
    loader = batches(
        data.domains, batch_size=cfg.data.batch_size, start=0,
        stop=steps * task.batches_per_step, seed=cfg.seed,
    )  # fmt: skip
    found = []
    for number in range(steps):
        task.set_learning_rates(number)
        with task.norm_backend():
            losses = task.train_step([next(loader) for _ in range(task.batches_per_step)])
        task.update_averages(number)
        found.append({k: float(v) for k, v in losses.items() if "/" not in k})
    return found


def disagreement(
    found: list[dict[str, float]], expected: list[dict[str, float]], where: str = "on the CPU",
    close: int = 1,
) -> str:  # fmt: skip
    """The first loss that is not finite, or not what it is elsewhere, in words.

    close: how many steps are held to the first one's tolerance.
    """
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        relative, absolute = FIRST if number < close else LATER
        for name, value in theirs.items():
            got = ours.get(name, math.nan)
            if not abs(got - value) <= relative * abs(value) + absolute:
                return f"step {number + 1}: {name} is {got:.4g}, {where} {value:.4g}"
    return ""


# ---- step


def step_items(context: Context) -> list[str]:
    if context.rehearsed:
        return [
            f"{name} {variant}"
            for name in SMALL for variant in ("fp32", "everything", "checkpointing")
        ]  # fmt: skip
    sure = [variant for variant in VARIANTS if variant not in OPTIONAL]
    pairs = [(n, v) for v in sure for n in (*RECIPES, LAST)] + [
        (n, v) for v in OPTIONAL for n in RECIPES
    ]
    return [" ".join(pair) for pair in pairs]


def run_step(item: str, context: Context) -> Result:
    """Ours beside the unfused twin: images/s, milliseconds by part, peak memory."""
    from gannorm.kernels import launch

    plans = context.out / "plans.json"
    if plans.exists():
        launch.PLANS = plans
    name, variant = item.split()
    overrides, how = VARIANTS[variant]
    which = SMALL[name] if context.rehearsed else [f"experiment={name}"]
    row = step.measure(
        item, [*which, *overrides], context.device, True, 1 if context.rehearsed else 8,
        how=how,
    )  # fmt: skip
    halves = "trainer.precision=bf16" in (*overrides, *how)
    return row | {"wrong": step.disagreement(row["first_losses"], BF16 if halves else step.AGREE)}
