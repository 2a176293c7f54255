"""What one eager call costs the host, with the Triton kernels compiled but not run.

    python -m benchmarks.host

Forward and backward of small inputs on the Triton path, on a machine with or without a GPU: the
kernels are compiled for sm_90, and Triton's driver is one whose launches return at once. What
remains is what the host does before a kernel can start: checks, autograd, plans, allocations and
looking up the compiled kernel. Beside it torch's own operations on the same tensors, which do their
arithmetic too (a few microseconds at this size), and ours on a CPU: C, and the
composition of torch ops that runs where there is no compiler.

The parts are measured in a second pass, by clocks around the functions in SPANS; a clock's own
time is subtracted. Labels are not looked into, as on a GPU. It relies on:
`triton.runtime.driver.set_active`, a compiled kernel taking its launcher from that driver
(`launcher_cls`, `utils.load_binary`), `gannorm.norms.backend._interprets` and
`gannorm.norms.functional.check_label_values`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, timing
from benchmarks.cases import Case
from gannorm import use_backend
from gannorm.norms import functional

# Where time is spent: (module, attribute), innermost clock counts. One that has gone is named in
# the output.
SPANS: dict[str, list[tuple[str, str]]] = {
    "checks and reshaping": [
        ("gannorm.norms.functional", op)
        for op in ("instance_norm", "batch_norm", "group_norm", "conditional_batch_norm")
    ],
    "Function.apply": [("gannorm.norms.autograd", "NormFunction.apply")],
    "autograd's backward": [("torch.autograd", "grad")],
    "launch preparation": [
        ("gannorm.kernels.launch", f"Launches.{name}") for name in ("forward", "backward")
    ],
    "launches": [("gannorm.kernels.runner", "Kernel.__call__")],
    "allocation": [("torch", "empty_like")]
    + [("torch", f"Tensor.{name}") for name in ("new_empty", "new_empty_strided")],
}
BACKEND_OF = {"ours": "triton", "torch": "torch", "cpu": "cpu", "composed": "torch"}
ROUNDS = 10
CASES = [
    Case("instance", (1, 4, 8, 8), "relu"),
    Case("instance", (1, 4, 8, 8), "residual"),
    Case("batch", (4, 4, 8, 8), "relu"),
    Case("conditional_batch", (4, 4, 8, 8), "relu"),
    Case("group", (2, 8, 8, 8), "silu", groups=4),
]


class Clock:
    """Time by part; a part's time does not contain that of the parts inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.open: list[float] = [0.0]  # time spent in inner parts, for each open part
        self.inside = self.outside = 0.0  # what a clock adds to its own part, and to the outer one
        empty = self.around("inner", lambda: None)
        outer = self.around("outer", lambda: [empty() for _ in range(1000)])
        bare = self.around("bare", lambda: [None for _ in range(1000)])
        outer(), bare()
        self.spent.clear()
        outer(), bare()
        inside, outside = self.spent["inner"], self.spent["outer"] - self.spent["bare"]
        self.inside, self.outside = inside / 1000, outside / 1000

    def around(self, label: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.open.append(0.0)
            began = time.perf_counter_ns()
            try:
                return f(*args, **kwargs)
            finally:
                elapsed = time.perf_counter_ns() - began
                own = elapsed - self.open.pop() - self.inside
                self.spent[label] = self.spent.get(label, 0.0) + own
                self.open[-1] += elapsed + self.outside

        return timed


class StubDriver:
    """A driver of Triton's that believes in an sm_90 GPU and launches nothing."""

    def __init__(self, launched: Callable[..., None]) -> None:
        self.launcher_cls = lambda source, metadata: launched
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 0, 32, 0, 1024),
            get_device_properties=lambda _: {
                "max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32,
            },
            unload_module=lambda _: None,
        )  # fmt: skip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def stub(launched: Callable[..., None]) -> None:
    """CPU tensors run through the Triton path from here on, as far as the launch."""
    from triton.runtime import driver

    from gannorm.norms import backend

    driver.set_active(StubDriver(launched))
    if not callable(backend._interprets):
        raise TypeError("gannorm.norms.backend._interprets is no function any more")
    backend._interprets = lambda: True  # what a CUDA tensor is not asked
    functional.check_label_values = lambda *_: None  # what is not done to a CUDA tensor


def _call(case: Case, t: cases.Tensors, f: Callable[[Case, cases.Tensors], Any]) -> None:
    torch.autograd.grad(f(case, t), list(t.leaves().values()), t.dy)


def _forward(case: Case, t: cases.Tensors, f: Callable[[Case, cases.Tensors], Any]) -> None:
    f(case, t)


def medians(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Microseconds of a call; the contestants take turns, ROUNDS times some calls at a stretch."""
    found: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(ROUNDS):
        for who, run in runs.items():
            samples = []
            with use_backend(BACKEND_OF[who]):
                run()
                for _ in range(repeats // ROUNDS):
                    began = time.perf_counter_ns()
                    run()
                    samples.append(time.perf_counter_ns() - began)
            found[who].append(statistics.median(samples) / 1000)
    return {who: statistics.median(us) for who, us in found.items()}


def parts(run: Callable[[], None], repeats: int) -> tuple[dict[str, float], list[str]]:
    """Median microseconds of one call by part; the functions of SPANS that do not exist, and the
    parts that no call came through."""
    clock, missing, patches = Clock(), [], []
    for label, places in SPANS.items():
        for module, path in places:
            *owners, name = path.split(".")
            owner: Any = import_module(module)
            for part in owners:
                owner = getattr(owner, part, None)
            if not hasattr(owner, name):
                missing.append(f"{module}.{path}")
                continue
            timed: Any = clock.around(label, getattr(owner, name))
            if label == "Function.apply":
                timed = staticmethod(timed)
            patches.append(mock.patch.object(owner, name, timed))
    samples: dict[str, list[float]] = {}
    for patch in patches:
        patch.start()
    try:
        for _ in range(repeats):
            clock.spent.clear()
            run()
            for label, ns in clock.spent.items():
                samples.setdefault(label, []).append(ns / 1000)
    finally:
        mock.patch.stopall()
    missing += [label for label in SPANS if label not in samples]
    return {label: statistics.median(us) for label, us in samples.items()}, missing


def measure(case: Case, repeats: int, launches: list[None]) -> dict[str, Any]:
    t = cases.tensors(case, "cpu")
    t.running_mean = t.running_var = None
    row: dict[str, Any] = {"name": str(case)}
    for direction, call in (("forward", _forward), ("both", _call)):
        mine = partial(call, case, t, cases.ours)
        with use_backend("triton"):
            mine()  # compiles the kernels
            del launches[:]
            mine()
        row[direction] = {"kernels": len(launches)}
        twin = partial(call, case, t, cases.eager)
        runs = {"ours": mine, "torch": twin, "cpu": mine, "composed": mine}
        found = medians(runs, repeats)
        row[direction] |= {f"{who}_us": us for who, us in found.items()}
    with use_backend("triton"):
        row["parts_us"], row["not_found"] = parts(partial(_call, case, t, cases.ours), repeats)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="two cases, few calls")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    launches: list[None] = []
    stub(lambda *_: launches.append(None))
    torch.set_num_threads(1)
    result = timing.environment("cpu") | {
        "protocol": f"medians of single eager calls, of {ROUNDS} turns each; launches stubbed; "
        "one thread",
        "calls": [
            measure(case, 50 if args.quick else 1000, launches)
            for case in (CASES[:2] if args.quick else CASES)
        ],
    }
    print(f"{result['device']}; microseconds a call")
    for row in result["calls"]:
        print(row["name"])
        for direction in ("forward", "both"):
            d = row[direction]
            print(f"    {direction:24} ours {d['ours_us']:7.1f}  torch {d['torch_us']:7.1f}  "
                  f"cpu {d['cpu_us']:7.1f}  composed {d['composed_us']:7.1f}  "
                  f"{d['kernels']} kernels")  # fmt: skip
        for label, microseconds in sorted(row["parts_us"].items(), key=lambda item: -item[1]):
            print(f"        {label:24} {microseconds:7.1f}")
        for name in row["not_found"]:
            print(f"        not found: {name}")
    timing.write(result, timing.result_path(result, args.out, "host-"))
    return 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":  # read at triton's first import
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "benchmarks.host", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    sys.exit(main())
