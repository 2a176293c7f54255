"""Stage 6, "processes": two of them, joined by NCCL, with a GPU each.

Synchronized norms beside the whole batch on one GPU, and both default trainings, started by
torchrun, beside one process. A rehearsal does the same on a CPU, joined by gloo.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import right, whole
from benchmarks.gpu.engine import Context, Result
from benchmarks.processes import Group, Message, watched
from benchmarks.step import configured
from gannorm import parallel, use_backend

ROOT = Path(__file__).resolve().parents[2]
NORMS, DTYPES = ("batch", "conditional_batch"), ("fp32", "fp64")
# Samples of the last process: half of an even batch, one of an uneven one, none.
SPLITS = {"halves": (right.EVEN, 2), "uneven": (right.UNEVEN, 1), "empty": (right.UNEVEN, 0)}
TWO, THREE = right.TINY  # samples, rehearsed
REHEARSED = {"halves": (TWO, 1), "uneven": (THREE, 1), "empty": (THREE, 0)}
COMPARED = 10  # steps, whose losses are held against those of one process
LIMIT, EACH = 60.0, 110.0  # seconds for a norm, and for a training
TRAINED = "train "


def processes_items(context: Context) -> list[str]:
    norms = [" ".join(each) for each in product(NORMS, DTYPES, SPLITS)]
    return [*norms, *(f"{TRAINED}{name}" for name in whole.SMALL)]


def run_processes(name: str, context: Context) -> Result:
    if name.startswith(TRAINED):
        return trained_twice(name.removeprefix(TRAINED), context)
    norm, dtype, split = name.split()
    c = right.Combination(norm, dtype, epilogue="leaky_relu")
    shape, last = (REHEARSED if context.rehearsed else SPLITS)[split]
    try:
        parts = two().call(part, c, shape, last, context.device, limit=LIMIT)
    except RuntimeError:
        two.cache_clear()  # which are ended
        raise
    t, expected = right.asked(c, shape, context.device)
    return {"wrong": wrong(c, parts, expected, right.answer(c, t))}


# ---- norms


@functools.cache
def two() -> Group:
    """They end with this worker."""
    return Group(2)


class Part(NamedTuple):
    """What a process gives for its samples, and what it sends for that."""

    answer: right.Answer
    forward: Counter[Message]
    backward: Counter[Message]


def part(c: right.Combination, shape: tuple[int, ...], last: int, device: str) -> Part:
    """In a process: the first one has all samples but `last`."""
    t, _ = right.asked(c, shape, device)
    own = slice(0, shape[0] - last) if parallel.leads() else slice(shape[0] - last, None)
    t.x, t.dy = t.x.detach()[own].requires_grad_(), t.dy[own]
    t.labels = None if t.labels is None else t.labels[own]
    with use_backend("triton"):
        with watched() as forward:
            y = right.ours(c, t, group="world")
        leaves = t.leaves()
        with watched() as backward:
            grads = torch.autograd.grad(y, list(leaves.values()), t.dy)
    answer = right.Answer(y, t.mean, t.var, dict(zip(leaves, grads, strict=True)))
    return Part(moved(answer, t.x.dtype), forward, backward)


def wrong(
    c: right.Combination, parts: list[Part], expected: right.Answer, alone: right.Answer
) -> str:
    """In words: parts that are not the whole batch's by its definition, or one GPU's; more than one
    collective."""
    answers = [p.answer for p in parts]
    first, grads = answers[0], {}
    for name in first.grads:
        each = [answer.grads[name] for answer in answers]
        grads[name] = torch.cat(each) if name == "x" else torch.stack(each).sum(0)
    found = right.Answer(torch.cat([a.y for a in answers]), first.mean, first.var, grads)
    words = [right.faults(c, found, expected)]
    if beside := right.faults(c, found, moved(alone, torch.float64)):
        words.append(f"not one GPU's: {beside}")
    words += [
        f"running {name} differs between the processes"
        for name in ("mean", "var")
        if not torch.equal(*(getattr(answer, name) for answer in answers))
    ]
    for number, p in enumerate(parts):
        for way, sent in (("forward", p.forward), ("backward", p.backward)):
            if sum(sent.values()) != 1:
                kinds = ", ".join(f"{calls} {m.kind}" for m, calls in sent.items()) or "nothing"
                words.append(f"{way} process {number} sends {kinds}")
    return "; ".join(filter(None, words))


def moved(answer: right.Answer, dtype: torch.dtype) -> right.Answer:
    """To the CPU."""

    def to(t: Tensor) -> Tensor:
        return t.detach().to("cpu", dtype)

    assert answer.mean is not None and answer.var is not None
    grads = {name: to(grad) for name, grad in answer.grads.items()}
    return right.Answer(to(answer.y), to(answer.mean), to(answer.var), grads)


# ---- trainings


def trained_twice(name: str, context: Context) -> Result:
    """By one process, and by two with the same whole batch."""
    batch = configured(whole.SMALL[name][0]).data.batch_size
    found = {
        "one": trained(name, [sys.executable], batch, context),
        "two": trained(
            name, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node=2"], batch, context
        ),
    }  # fmt: skip
    losses = {way: each for way, (each, _) in found.items()}
    return {
        "wrong": whole.disagreement(losses["two"], losses["one"], "in one process"),
        "images_per_second": {way: rate for way, (_, rate) in found.items()},
        "losses": losses["two"], "losses_one": losses["one"],
    }  # fmt: skip


def trained(
    name: str, launcher: list[str], batch: int, context: Context
) -> tuple[list[dict[str, float]], float]:
    """Of a default training of its own processes: the first losses, images/s."""
    folder = context.out / "processes" / f"{name}-{'two' if len(launcher) > 1 else 'one'}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier command's
    steps = COMPARED if context.rehearsed else whole.STEPS
    few = ["metrics.samples=20"] if context.rehearsed else []
    command = [
        *launcher, str(ROOT / "train.py"), *whole.shortened(name, steps, context), *few,
        f"data.global_batch_size={batch}", f"trainer.device={context.device}",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=EACH)
    except subprocess.TimeoutExpired:
        process.terminate()  # and torchrun its processes
        process.communicate(timeout=30)
        raise RuntimeError(f"{' '.join(command)}: no end in {EACH:.0f} s") from None
    if process.returncode:
        print(said, file=sys.stderr)
        told = re.search(r"(^|\[rank\d+\]: )(error|\w+Error): .*", said, re.MULTILINE)
        raise RuntimeError(told[0] if told else f"train.py ended with {process.returncode}")
    return whole.logged(folder, COMPARED)
