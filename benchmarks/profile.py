"""Where a training step's time goes, and how far that is from its multiplications alone.

    python -m benchmarks.profile

parts       seconds between the borders of a step's parts, each part without those inside it; the
            rest is losses, image pools and Python. Logging: adding up the losses, and a log's
            share of a step
operators   torch's profiler: a part's operators by kind, those inside an operator counted with it
            (a convolution's change of layout); backward by what was differentiated. On a CPU its
            own time, on a GPU the kernels'
floor       the multiply-adds of convolutions and linear layers that torch dispatches (forward, and
            the gradients that are asked for), two operations each, at the speed of the faster of a
            large matrix product and a 3x3 convolution here. A convolution that needs fewer
            multiplications (Winograd's) could be below

The published sizes of a CycleGAN and of a projection GAN on random images, and both default
trainings on their embedded data. What the profiler itself takes is in the operators' time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import step, timing
from benchmarks.operators import OPERATORS, PARTS, REST, SPECTRAL, D, G, Places, kind
from benchmarks.scaling import table
from gannorm.errors import answering_requests
from gannorm.models import convolution
from gannorm.tasks import Task
from gannorm.training.monitor import Monitor
from gannorm.training.run import Meter

WIDTHS = ["model.g_widths=[64,64,64,64]", "model.d_widths=[64,64,64,64]"]
CASES: dict[str, dict[str, list[str]]] = {
    "cyclegan": {
        "CycleGAN, 64 filters, 9 blocks, 128x128": [
            "experiment=cyclegan_horse2zebra", "data.root=.", "data.image_size=128",
        ],
        "model=cyclegan": ["model=cyclegan"],
    },
    "resblock_gan": {
        "projection GAN, 64 filters, 32x32": [
            "experiment=sngan_cifar10", *WIDTHS, "optim.d_steps=1",
        ],
        "model=resblock_gan": ["model=resblock_gan"],
    },
}  # fmt: skip
SMALL = {
    "cyclegan": ["model.width=4", "model.blocks=1", "model.d_width=4", "data.image_size=32"],
    "resblock_gan": ["model.g_widths=[8,8,8,8]", "model.d_widths=[8,8,8]", "data.batch_size=4"],
}
TELL = 0.01  # of a step: operators of no kind that take more are named
Numbers = dict[str, float]


class Parts:
    """What `clock` moves on by, for each part, while no part inside it runs.

    clock: returns numbers, or arrays of them, that only grow.
    """

    def __init__(self, clock: Callable[[], Any]) -> None:
        self.clock, self.open = clock, list[str]()
        self.spent: dict[str, Any] = {}
        self.since: Any = None

    def _charge(self) -> None:
        now = self.clock()
        if self.open:
            part = self.open[-1]
            self.spent[part] = self.spent.get(part, 0.0) + now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.open and self.open[-1] == name:  # a derivative inside a derivative
            yield
            return
        with record_function(name):
            self._charge()
            self.open.append(name)
            try:
                yield
            finally:
                self._charge()
                self.open.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return inside


@contextmanager
def watching(task: Task, parts: Parts) -> Iterator[None]:
    """Inside, a step of the task tells `parts` where it is."""
    with ExitStack() as stack:

        def patch(owner: Any, method: str, name: str) -> None:
            inside = parts.around(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, inside))

        for name in ("backward", "grad"):
            patch(torch.autograd, name, "backward")
        descend = task._descend

        def descended(name: str, losses: Iterable[Tensor]) -> Tensor:
            """The optimizer's part, but for the losses, which are made in it."""
            made, none = iter(losses), object()
            inside = parts.around("rest", lambda: next(made, none))
            with parts.part("optimizers"):
                return descend(name, iter(inside, none))

        stack.enter_context(mock.patch.object(task, "_descend", descended))
        moves = {key: [named(SPECTRAL, move) for move in each] for key, each in task.moves.items()}
        stack.enter_context(mock.patch.object(task, "moves", moves))
        convolved = named("_Convolution", convolution._forward)
        stack.enter_context(mock.patch.object(convolution, "_forward", convolved))
        for name, nets in ((G, task.generators), (D, task.discriminators)):
            for net in nets.values():
                patch(net, "forward", name)
                for module in net.modules():
                    if isinstance(module, ParametrizationList):  # spectral norms, and no others
                        inside = named(SPECTRAL, module.forward)
                        stack.enter_context(mock.patch.object(module, "forward", inside))
        yield


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """For the profiler alone."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return inside


def watched_step(run: step.Trained, parts: Parts, meter: Meter) -> None:
    task = run.task
    with watching(task, parts):
        with parts.part("data"):
            taken = [next(run.batches) for _ in range(task.batches_per_step)]
        with parts.part("rest"), task.norm_backend():
            losses = task.train_step(taken)
        with parts.part("EMA"):
            task.update_averages(10**9)
        with parts.part("logging"):
            meter.add(losses, 1.0)


def a_log(run: step.Trained, meter: Meter, times: int) -> float:
    """Milliseconds of a log: the means, a line of metrics.jsonl and TensorBoard's scalars."""
    found, losses = [], run.step()
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(Path(folder), 0)
        for number in range(1, times + 1):
            meter.add(losses, 1.0)
            began = time.perf_counter()
            monitor.scalars(number, meter.read())
            found.append(1000 * (time.perf_counter() - began))
        monitor.close()
    return statistics.median(found)


def by_part(run: step.Trained, rounds: int) -> tuple[Numbers, float]:
    """Milliseconds of each part, and of a step that nobody looks into; medians."""
    meter, taken, whole = Meter(run.images), list[Numbers](), list[float]()
    for _ in range(rounds):
        began = step._now(run.device)
        run.step()
        whole.append(1000 * (step._now(run.device) - began))
        parts = Parts(lambda: 1000 * step._now(run.device))
        watched_step(run, parts, meter)
        taken.append(parts.spent)
    medians = {part: statistics.median(each.get(part, 0.0) for each in taken) for part in PARTS}
    medians["logging"] += a_log(run, meter, 20) / run.task.cfg.trainer.log_every
    return medians, statistics.median(whole)


# ---- operators


def by_operator(run: step.Trained, steps: int) -> tuple[Numbers, Numbers]:
    """Milliseconds of a step by kind, and of the operators of no kind by name."""
    gpu, meter = run.device == "cuda", Meter(run.images)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            watched_step(run, Parts(time.perf_counter), meter)
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    places, kinds, unknown = Places(events), defaultdict[str, float](float), Counter[str]()
    for event in events:
        place = places.of(event)
        if not place.part:  # the profiler's own
            continue
        milliseconds = getattr(event, own) / 1000 / steps
        which = kind(place)
        kinds[which or REST] += milliseconds
        if not which:
            unknown[place.operator] += milliseconds
    return {name: kinds.get(name, 0.0) for name in OPERATORS}, dict(unknown.most_common(8))


# ---- the floor


def operations(run: step.Trained) -> dict[str, list[int]]:
    """Of a step: floating-point operations of convolutions and of linear layers, by part."""
    counter = FlopCounterMode(display=False)

    def clock() -> np.ndarray:
        counts = counter.get_flop_counts().get("Global", {})
        convolutions = sum(n for op, n in counts.items() if "conv" in str(op))
        return np.array([convolutions, sum(counts.values()) - convolutions])

    parts = Parts(clock)
    with counter:
        watched_step(run, parts, Meter(run.images))
    return {name: [int(n) for n in found] for name, found in parts.spent.items()}


def speeds(device: str, quick: bool) -> Numbers:
    """GFLOP/s of what a step's multiplications are held against; the fastest call's: a floor."""
    n, batch = (256, 1) if quick else (2048, 8)
    a, b = torch.randn(2, n, n, device=device)
    x = torch.randn(batch, 256, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    runs: dict[str, tuple[Callable[[], Any], float]] = {
        f"matrix product, {n}": (lambda: a @ b, 2 * n**3),
        f"3x3 convolution, ({batch}, 256, 32, 32), 256 channels": (
            lambda: F.conv2d(x, w, padding=1), 2 * 9 * 256 * 256 * 32 * 32 * batch,
        ),
    }  # fmt: skip
    found = {}
    for name, (run, count) in runs.items():
        seconds = []
        for _ in range(3 if quick else 40):
            began = step._now(device)
            with torch.no_grad():
                run()
            seconds.append(step._now(device) - began)
        found[name] = count / min(seconds) / 1e9
    return found


def floors(counted: dict[str, list[int]], gflops: float) -> dict[str, Numbers]:
    """Milliseconds below which neither a part nor a kind of operators comes."""

    def ms(*counts: int) -> float:
        return sum(counts) / gflops / 1e6

    (forward, linear), (backward, more) = (
        np.sum([n for part, n in counted.items() if (part == "backward") == back], 0).tolist()
        for back in (False, True)
    )
    return {
        "parts": {name: ms(*counted[name]) for name in PARTS if sum(counted.get(name, [0]))},
        "operators": {
            "convolution forward": ms(forward), "convolution backward": ms(backward),
            "linear": ms(linear, more),
        },
    }  # fmt: skip


# ---- the command


def measured(
    name: str, overrides: list[str], device: str, gflops: float, quick: bool
) -> dict[str, Any]:
    synthetic = not overrides[0].startswith("model=")
    run = step.Trained("ours", [*overrides, f"trainer.device={device}"], device, synthetic)
    counted = operations(run)
    began = step._now(device)
    run.step()
    seconds = 40.0 / (step._now(device) - began)
    rounds = 1 if quick else max(5, min(40, int(seconds / 2)))
    parts, whole = by_part(run, rounds)
    operators, unknown = by_operator(run, 1 if quick else max(2, min(10, rounds // 2)))
    return {
        "name": name, "overrides": overrides, "batch": run.task.cfg.data.batch_size,
        "data": "random images" if synthetic else run.task.cfg.data.name, "rounds": rounds,
        "step_ms": whole, "parts_ms": parts, "operators_ms": operators, "of_no_kind_ms": unknown,
        "operations": counted, "floor_ms": floors(counted, gflops),
    }  # fmt: skip


def cell(ms: float, whole: float) -> str:
    return f"{ms:.1f} ({100 * ms / whole:.0f}%)" if ms >= 0.05 else "-"


def against(ms: float, floor: float) -> str:
    """Time, floor, and how many times it is."""
    return f"{ms:.1f} / {floor:.1f} = {ms / floor:.2f}" if floor >= 0.05 else "-"


def told(result: dict[str, Any]) -> str:
    """Markdown tables with a column for each training."""
    cases = result["cases"]
    head = [f"{c['name']}, batch {c['batch']}" for c in cases]
    texts = []
    for what, rows in (("parts", PARTS), ("operators", OPERATORS)):
        sums = [sum(c[f"{what}_ms"].values()) for c in cases]
        lines = [
            [row, *(cell(c[f"{what}_ms"][row], s) for c, s in zip(cases, sums, strict=True))]
            for row in rows
        ]
        lines.append(["sum", *(f"{each:.1f}" for each in sums)])
        if what == "parts":
            lines.append(["a step, not looked into", *(f"{c['step_ms']:.1f}" for c in cases)])
        texts.append(table([f"{what}, ms", *head], lines))
    lines = []
    for what, rows in (("parts", PARTS), ("operators", OPERATORS)):
        lines += [
            [row, *(against(c[f"{what}_ms"][row], c["floor_ms"][what].get(row, 0)) for c in cases)]
            for row in rows
            if any(row in c["floor_ms"][what] for c in cases)
        ]
    lines.append(
        ["a step", *(against(c["step_ms"], sum(c["floor_ms"]["parts"].values())) for c in cases)]
    )
    texts.append(table(["ms / floor = times", *head], lines))
    texts += [
        f"of no kind, {c['name']}: {name}, {ms:.2f} ms"
        for c in cases
        for name, ms in c["of_no_kind_ms"].items()
        if ms > TELL * sum(c["operators_ms"].values())
    ]
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--task", choices=(*CASES, "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small networks, one step")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    timing.use_device(args.device)
    found = speeds(args.device, args.quick)
    result: dict[str, Any] = timing.environment(args.device) | {
        "protocol": "parts: medians of steps, which alternate with steps that nobody looks into; "
        "operators: torch.profiler, means; floor: counted operations at the larger of `gflops`",
        "gflops": found, "cases": [],
    }  # fmt: skip
    path = timing.result_path(result, args.out, "profile-")
    todo = [
        (name, [*overrides, *(SMALL[task] if args.quick else [])])
        for task, cases in CASES.items() if args.task in (task, "both")
        for name, overrides in cases.items()
    ]  # fmt: skip
    for name, overrides in tqdm(todo, unit="training"):
        case = measured(name, overrides, args.device, max(found.values()), args.quick)
        result["cases"].append(case)
        timing.write(result, path)
    print(f"{result['device']}\n")
    for what, speed in found.items():
        print(f"{what}: {speed:.0f} GFLOP/s")
    print(f"\n{told(result)}\n\n{path}")
    return 0


if __name__ == "__main__":
    with answering_requests():
        sys.exit(main())
