"""What training on several processes sends, costs, and would cost on many GPUs.

    python -m benchmarks.scaling

counted    the collectives of a step and of a log, by what they are for: calls, and the bytes that
           a process puts in; from the running code, on two processes
measured   both default trainings on a CPU: two processes of one thread each beside one process of
           two, the same whole batch; stretches as long as from log to log, in turns
projected  the published recipes on 1 to 64 GPUs: a GPU's measured step and the time that a ring
           takes for the counted bytes at a stated speed; nothing of it was run

Writes JSON, and the projections as a plot (--plot).
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm

from benchmarks import step, timing
from benchmarks.processes import Group, Message, watched
from gannorm import parallel
from gannorm.data import batches, build_data
from gannorm.errors import answering_requests
from gannorm.norms import cpu
from gannorm.tasks import build_task
from gannorm.training.request import divided
from gannorm.training.run import Meter

PROCESSES = 2
SMALL = [
    "trainer.log_every=4",
    "model.width=4",
    "model.blocks=1",
    "model.d_width=4",
    "data.batch_size=2",
]
# Of the recipes, the smallest batch that their norms and pools take: what gradients and norms send
# does not depend on it, and an image pool sends each image.
TINY = {"cyclegan_horse2zebra": 1, "sngan_cifar10": 2, "biggan_cifar10": 2}
MEASURED = "gpu-nvidia-h200-2026-11-27/step.json"  # images/s of one H200, float32
GPUS = (1, 2, 4, 8, 16, 32, 64)
MACHINE = 8  # GPUs that NVLink joins
# GB/s each way at a ring's slowest place, and microseconds of a call. NVLink: 900 GB/s of an H200
# both ways (nvidia.com/en-us/data-center/h200). A network: the machine's line rate; a ring enters
# and leaves a machine once. Calls: NCCL's own model (github.com/NVIDIA/nccl, src/graph/tuning.cc)
# has 4.4 + 2 * 7 * 0.52 = 12 us for a tree of 8 GPUs and 4.4 + 2 * (7 * 0.52 + 3 * 5) = 42 us for
# 8 machines of 8; the host's share is added.
LINKS = {
    "NVLink": (450.0, 20.0), "100 Gbit/s": (12.5, 50.0), "25 Gbit/s": (3.125, 50.0),
    "10 Gbit/s": (1.25, 50.0),
}  # fmt: skip
SAME = 1e-4  # of the first step's losses
WORTH = 0.5  # of N GPUs' work at least, or fewer would do as well
Parts = dict[str, dict[str, Any]]  # by purpose: kind, calls, bytes


class Training:
    """A training less its figures: what its loop does in a step, and at a log."""

    def __init__(self, overrides: list[str], synthetic: bool) -> None:
        cfg = step.configured(*overrides, "trainer.device=cpu")
        cfg.data = divided(cfg.data, None)
        data = None if synthetic else build_data(cfg.data)
        for seed in (random.seed, torch.manual_seed):
            seed(0)
        self.task = build_task(cfg, parallel.CPU, data.num_classes if data else 10)
        self.task.share_state()
        whole = cfg.data.whole_batch
        self.batches = (
            step.random_batches(cfg) if data is None
            else batches(data.domains, batch_size=whole, start=0, stop=2**30, seed=0,
                         own=parallel.own(whole))
        )  # fmt: skip
        self.question, self.number = parallel.Question(), 0
        self.meter = Meter(whole * self.task.batches_per_step)

    def step(self) -> None:
        self.question.ask(0)
        began = time.perf_counter()
        self.task.set_learning_rates(self.number)
        with self.task.norm_backend():
            taken = [next(self.batches) for _ in range(self.task.batches_per_step)]
            losses = self.task.train_step(taken)
        self.task.update_averages(self.number)
        self.number += 1
        self.meter.add(losses, time.perf_counter() - began)
        self.question.answer()

    def log(self) -> dict[str, float]:
        figures = self.meter.read()
        if where := self.task.replicas_differ():
            raise RuntimeError(f"{where} is not the first process's")
        return {k: v for k, v in figures.items() if k.startswith("loss/")}


# ---- counted


def count(overrides: list[str], steps: int) -> tuple[Counter[Message], Counter[Message]]:
    """In a process: what it sends in so many steps, and at a log."""
    training = Training(overrides, synthetic=True)
    with watched() as of_steps:
        for _ in range(steps):
            training.step()
    with watched() as of_log:
        training.log()
    return of_steps, of_log


def purpose(message: Message) -> str:
    if message.kind == "all_gather":
        return "norms, forward" if message.dtype == "double" else "image pools"
    return {"double": "norms, backward", "long int": "the agreement to stop"}.get(
        message.dtype, "gradients"
    )


def summed(found: Counter[Message], steps: int = 1) -> Parts:
    parts: Parts = {}
    for message, calls in sorted(found.items()):
        part = parts.setdefault(
            purpose(message), {"kind": message.kind, "calls": 0.0, "bytes": 0.0}
        )
        part["calls"] += calls / steps
        part["bytes"] += calls * message.bytes / steps
    return parts


def counted(name: str, overrides: list[str], steps: int) -> dict[str, Any]:
    with Group(PROCESSES) as group:
        first, *others = group.call(count, overrides, steps, limit=1200.0)
    if any(other != first for other in others):
        raise RuntimeError(f"{name}: the processes do not send the same")
    of_steps, of_log = first
    cfg = step.configured(*overrides)
    log = {f"{m.kind} {m.dtype}": calls * m.bytes for m, calls in of_log.items()}
    return {
        "batch": cfg.data.batch_size, "steps": steps, "parts": summed(of_steps, steps),
        "log": {"calls": sum(of_log.values()), "bytes": sum(log.values())},
    }  # fmt: skip


# ---- measured

_trainings: dict[str, Training] = {}  # of a process


def begin(name: str, overrides: list[str]) -> dict[str, float]:
    """In a process: the first step's losses."""
    cpu.keep_memory()
    _trainings[name] = Training(overrides, synthetic=False)
    _trainings[name].step()
    return _trainings[name].log()


def stretch(name: str) -> float:
    """In a process: the seconds from one log to the next."""
    training = _trainings[name]
    if parallel.world() > 1:
        distributed.barrier()
    began = time.perf_counter()
    for _ in range(training.task.cfg.trainer.log_every):
        training.step()
    training.log()
    return time.perf_counter() - began


def measured(name: str, overrides: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of both, in turns, and how many times longer two processes take, pair by pair."""
    whole = step.configured(*overrides).data.batch_size
    with Group(1, threads=PROCESSES) as one, Group(PROCESSES) as several:
        ways = {"one": (one, []), "several": (several, [f"data.global_batch_size={whole}"])}
        first = {
            way: group.call(begin, name, [*overrides, *more])[0]
            for way, (group, more) in ways.items()
        }
        for key, value in first["one"].items():
            if not abs(first["several"][key] - value) <= SAME * abs(value):
                raise RuntimeError(f"{name}: {key} is {first['several'][key]}, alone {value}")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in tqdm(range(rounds + 1), desc=name, unit="round"):
            for way, (group, _) in ways.items():
                found = max(group.call(stretch, name))
                if number > 0:  # in the first one memory is taken
                    seconds[way].append(found)
    ratios = [b / a for a, b in zip(seconds["one"], seconds["several"], strict=True)]
    return {
        "batch": whole, "steps": step.configured(*overrides).trainer.log_every, "seconds": seconds,
        "medians": {way: statistics.median(each) for way, each in seconds.items()},
        "ratios": ratios, "ratio": statistics.median(ratios), "first_losses": first,
        "load": os.getloadavg()[0],  # of a machine that has nothing else to do: about PROCESSES
    }  # fmt: skip


# ---- projected


def sending(parts: Parts, gpus: int, link: str) -> float:
    """Seconds of a step that a ring of `gpus` spends on the counted parts, none of them hidden
    behind the computation but the agreement, which the CPUs reach meanwhile."""
    if gpus == 1:
        return 0.0
    speed, latency = LINKS[link]
    total = 0.0
    for name, part in parts.items():
        if name != "the agreement to stop":
            passes = 2 * (gpus - 1) / gpus if part["kind"] == "all_reduce" else gpus - 1
            total += passes * part["bytes"] / (speed * 1e9) + part["calls"] * latency / 1e6
    return total


def projected(name: str, parts: Parts, rates: dict[str, Any]) -> dict[str, Any]:
    """By link and number of GPUs: images/s of all and the share of their work that is left."""
    cfg = step.configured(f"experiment={name}", *_rooted(name))
    images = cfg.data.batch_size * cfg.optim.d_steps
    pools = cfg.data.batch_size / TINY[name]
    scaled = {
        k: {**part, "bytes": part["bytes"] * (pools if k == "image pools" else 1)}
        for k, part in parts.items()
    }
    compute = images / rates[f"{name} fp32"]["images_per_second"]["ours"]
    links: dict[str, Any] = {}
    for link in LINKS:
        rows = {}
        for gpus in GPUS:
            if link == "NVLink" and gpus > MACHINE:
                continue
            seconds = compute + sending(scaled, gpus, link)
            rows[str(gpus)] = {
                "images_per_second": gpus * images / seconds, "efficiency": compute / seconds,
            }  # fmt: skip
        links[link] = rows
    return {"step_seconds": compute, "images_per_step": images, "links": links}


def worth(rows: dict[str, dict[str, float]]) -> str:
    """Up to how many GPUs, of those that were looked at."""
    fitting = [gpus for gpus, row in rows.items() if row["efficiency"] >= WORTH]
    return fitting[-1] + ("" if fitting[-1] == list(rows)[-1] else ", no more")


def draw(projections: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(projections), figsize=(5 * len(projections), 4.5))
    for axis, (name, found) in zip(axes, projections.items(), strict=True):
        for link, rows in found["links"].items():
            shares = [100 * row["efficiency"] for row in rows.values()]
            axis.plot([int(gpus) for gpus in rows], shares, marker="o", label=link)
        axis.axhline(100 * WORTH, color="black", linewidth=1, linestyle="--")
        axis.set(xscale="log", xlabel="GPUs", ylim=(0, 105), title=name,
                 ylabel="% of the GPUs' work (projected)")  # fmt: skip
        axis.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axis.minorticks_off()
        axis.legend()
    figure.suptitle("Projected, not measured: one H200's step and a ring at the link's speed")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---- the command


def _rooted(name: str) -> list[str]:
    return ["data.root=."] if name == "cyclegan_horse2zebra" else []


def cases(quick: bool) -> dict[str, list[str]]:
    if quick:
        return {
            "cyclegan": ["model=cyclegan", *SMALL],
            "resblock_gan": ["model=resblock_gan", SMALL[0], "model.g_widths=[8,8,8,8]",
                             "model.d_widths=[8,8,8,8]", "data.batch_size=4"],
        }  # fmt: skip
    recipes = {
        name: [f"experiment={name}", f"data.batch_size={batch}", *_rooted(name)]
        for name, batch in TINY.items()
    }
    return {name: [choice] for name, choice in step.DEFAULTS.items()} | recipes


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def told(result: dict[str, Any]) -> str:
    lines = []
    for name, found in result["counted"].items():
        lines += [
            f"| {name} | {what} | {part['kind']} | {part['calls']:g} | {part['bytes']:,.0f} |"
            for what, part in found["parts"].items()
        ] + [f"| {name} | a log | | {found['log']['calls']} | {found['log']['bytes']:,} |"]
    rows = [line.strip("| ").split(" | ") for line in lines]
    texts = [table(["counted", "for", "kind", "calls a step", "bytes"], rows)]
    rows = [
        [name, f"{1000 * m['medians']['one'] / m['steps']:.1f} ms",
         f"{1000 * m['medians']['several'] / m['steps']:.1f} ms",
         f"{m['ratio']:.2f} ({min(m['ratios']):.2f} to {max(m['ratios']):.2f})"]
        for name, m in result["measured"].items()
    ]  # fmt: skip
    texts.append(table(["measured", "one process", "two processes", "ratio"], rows))
    for name, found in result["projected"].items():
        rows = [
            [link, *(f"{r['images_per_second']:,.0f} ({100 * r['efficiency']:.0f}%)"
                     for r in each.values()), *["-"] * (len(GPUS) - len(each)), worth(each)]
            for link, each in found["links"].items()
        ]  # fmt: skip
        texts.append(table([f"projected: {name}", *map(str, GPUS), "worth it up to"], rows))
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(PROCESSES)
    environment = timing.environment("cpu") | {
        "protocol": "counted: torch's profiler, what a process puts in; measured: stretches from "
        "log to log in turns, medians, ratios pair by pair; projected: not run",
        "links": {name: {"gbps": s, "us_a_call": t} for name, (s, t) in LINKS.items()},
    }  # fmt: skip
    result: dict[str, Any] = environment | {"counted": {}, "measured": {}, "projected": {}}
    path = timing.result_path(result, args.out, "scaling-")
    todo = cases(args.quick)
    defaults = {name: todo[name] for name in step.DEFAULTS}

    def add(part: str, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        result[part][name] = make(name, *arguments)
        timing.write(result, path)

    for name, overrides in todo.items():
        add("counted", name, counted, overrides, 2 if name in defaults else 1)
    for name, overrides in defaults.items():
        add("measured", name, measured, overrides, 1 if args.quick else args.rounds)
    rates = timing.read(timing.RESULTS / MEASURED)["items"]
    for name in TINY:
        if name in result["counted"]:
            add("projected", name, projected, result["counted"][name]["parts"], rates)
    if result["projected"] and args.plot:
        draw(result["projected"], args.plot)
    print(f"{result['device']}\n\n{told(result)}\n\n{path}")
    return 0


if __name__ == "__main__":
    with answering_requests():
        sys.exit(main())
