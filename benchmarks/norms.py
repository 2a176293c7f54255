"""Time every norm, forward and forward + backward, beside torch and whoever else is installed.

    python -m benchmarks.norms                   # on the GPU, or on the CPU where there is none
    python -m benchmarks.norms --only conditional_batch --device cpu
    python -m benchmarks.norms --only growth

All cases on a GPU take most of an hour, nearly all of it torch.compile's; --only takes a part of
a case's name, and every case is in the file as soon as it is done.

Each case is first held against a float64 oracle; a wrong one is named and not timed, and the
command then exits with 1. Contestants: ours; the unfused sequence of torch's operations, eager
and under torch.compile; for conditional batch norm also a plain batch norm, which does less; and
other projects' kernels (the extra `peers`; forward only where they have no backward to offer).

Floors: bytes that must be read and written, over the bandwidth of a device-to-device copy
measured in the same run. 100% means as fast as copying those bytes.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import cases, peers, plot, timing
from benchmarks.cases import Case, Tensors
from gannorm.errors import RequestError, answering_requests

DIRECTIONS = ("forward", "both")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    timing.use_device(args.device)
    todo, growing = select(args)
    if not todo and not growing:
        raise RequestError(f"--only {args.only}: no case has this in its name")
    refused = check(todo + growing, args.device)
    result = timing.environment(args.device) | {
        "copy_gbps": timing.copy_bandwidth(args.device, args.quick),
        "peers": peers.installed(),
        "refused": refused,
        "cases": [],
        "geometric_means": {},
        "growth": {},
    }
    path = timing.result_path(result, args.out)
    for case in tqdm([c for c in todo if str(c) not in refused], unit="case"):
        compiled = not args.quick or case.op == "instance"
        seconds = 0.05 if args.quick else 2.0
        result["cases"] += measure(case, result, args.device, seconds, compiled)
        timing.write(result, path)  # an interrupted run keeps what it has
    result["geometric_means"] = geometric_means(result["cases"])
    result["growth"] = growth([c for c in growing if str(c) not in refused], args)
    timing.write(result, path)
    print(table(result))
    print(f"{path}\n{plot.draw(result, path.with_suffix('.png'))}")
    for name, reason in refused.items():
        print(f"refused, not timed: {name}: {reason}", file=sys.stderr)
    return 1 if refused else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norms", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name has this")
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def select(args: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """The cases to time, and the growing layer ("growth" names it)."""
    if args.quick:
        todo = cases.quick_cases()
    else:
        todo = cases.cuda_cases() if args.device == "cuda" else cases.cpu_cases()
    growing = cases.growth_cases(args.quick) if args.only in "growth" else []
    return [c for c in todo if args.only in str(c)], growing


def check(todo: list[Case], device: str) -> dict[str, str]:
    """Names of the cases that ours gets wrong, and how."""
    refused = {}
    for case in tqdm(todo, desc="checking", unit="case"):
        t = cases.tensors(case, device)
        fault = cases.wrong(case, cases.errors(case, t, partial(cases.ours, case, t)))
        if fault:
            refused[str(case)] = fault
            tqdm.write(f"wrong: {case}: {fault}", file=sys.stderr)
    return refused


def _directed(f: Callable[[], Tensor], t: Tensors, direction: str) -> timing.Run:
    leaves = list(t.leaves().values())

    def forward() -> None:
        with torch.no_grad():
            f()

    def both() -> None:
        torch.autograd.grad(f(), leaves, t.dy)

    return forward if direction == "forward" else both


def contestants(
    case: Case, t: Tensors, direction: str, compiled: bool
) -> tuple[dict[str, timing.Run], dict[str, str]]:
    """Who can run, warm; and why the others cannot."""
    makers: dict[str, Callable[[], timing.Run]] = {}

    def add(name: str, f: Callable[[Case, Tensors], Tensor], case: Case, t: Tensors) -> None:
        makers[name] = lambda: _directed(partial(f, case, t), t, direction)

    add("ours", cases.ours, case, t)
    add("eager", cases.eager, case, t)
    if compiled:
        torch.compiler.reset()
        add("compile", torch.compile(cases.eager, dynamic=False), case, t)
    if case.op == "conditional_batch":
        plain = replace(case, op="batch")
        add("unconditional", cases.eager, plain, cases.tensors(plain, t.x.device.type))
    expected: list[Tensor] = []

    def peer(make: Callable[[], peers.Peer]) -> timing.Run:
        made = make()
        if direction == "both" and not made.differentiable:
            raise NotImplementedError("forward only")
        if not expected:
            expected.append(cases.oracle(case, t)[0])
        if peers.mistaken(case, expected[0], made.run()):
            raise ValueError("its output is not the norm's")
        return _directed(made.run, t, direction)

    for name, make in peers.build(case, t).items():
        makers[name] = partial(peer, make)
    ready, absent = {}, {}
    for name, maker in makers.items():
        try:
            run = maker()
            run()
            ready[name] = run
        except Exception as error:  # code of others, in any version
            if name == "ours":
                raise
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ready, absent


def measure(
    case: Case, result: dict[str, Any], device: str, seconds: float, compiled: bool
) -> list[dict[str, Any]]:
    """One entry for each direction of a case."""
    t = cases.tensors(case, device)
    accuracy = {
        "ours": cases.errors(case, t, partial(cases.ours, case, t)),
        "eager": cases.errors(case, t, partial(cases.eager, case, t)),
    }
    entries = []
    for direction in DIRECTIONS:
        runs, absent = contestants(case, t, direction, compiled)
        times = clocked(runs, absent, device, seconds)
        floor = case.floor(direction) * case.activation_bytes()
        floor_us = floor / result["copy_gbps"] / 1000
        entries.append(
            {
                "name": str(case),
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "layout": case.layout,
                "epilogue": case.epilogue,
                "direction": direction,
                "floor_moves": case.floor(direction),
                "floor_bytes": floor,
                "floor_us": floor_us,
                "times_us": times,
                "percent_of_copy": {
                    who: {p: 100 * floor_us / us for p, us in by_protocol.items()}
                    for who, by_protocol in times.items()
                },
                "errors": accuracy,
                "absent": absent,
            }
        )
    return entries


def clocked(
    runs: dict[str, timing.Run], failed: dict[str, str], device: str, seconds: float
) -> dict[str, dict[str, float]]:
    if device == "cuda":
        return timing.time_cuda(runs, failed)
    return timing.time_cpu(runs, seconds)


def geometric_means(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times ours is faster: by protocol, "op epilogue direction" and contestant.

    With and without ReLU apart: torch.compile saves its mask as bools, which is slow on a CPU.
    """
    logs: dict[tuple[str, str, str], list[float]] = {}
    for entry in entries:
        activation = cases.EPILOGUES[entry["epilogue"]][0]
        relu = "with relu" if activation == "relu" else "without relu"
        kind = "plain" if entry["epilogue"] == "none" else f"fused {relu}"
        mine = entry["times_us"]["ours"]
        for who, theirs in entry["times_us"].items():
            for protocol in mine.keys() & theirs.keys() if who != "ours" else ():
                ratio = math.log(theirs[protocol] / mine[protocol])
                for group in (f"{entry['op']} {kind}", f"all {relu}"):
                    logs.setdefault((protocol, f"{group} {entry['direction']}", who), []).append(
                        ratio
                    )
    means: dict[str, dict[str, dict[str, float]]] = {}
    for (protocol, group, who), ratios in sorted(logs.items()):
        means.setdefault(protocol, {}).setdefault(group, {})[who] = math.exp(
            statistics.fmean(ratios)
        )
    return means


def growth(growing: list[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Forward + backward of one layer at growing sizes.

    largest_jump: time over time divided by pixels over pixels of neighbouring sizes; 1 is linear.
    """
    timed: dict[str, list[dict[str, float]]] = {"ours": [], "eager": []}
    for case in tqdm(growing, desc="growth", unit="size"):
        t = cases.tensors(case, args.device)
        runs, failed = contestants(case, t, "both", compiled=False)
        clock = clocked(runs, failed, args.device, 0.05 if args.quick else 3.0)
        for who, by_protocol in timed.items():
            by_protocol.append(clock[who])
    protocol = plot.shared_protocol([*timed["ours"], *timed["eager"]]) if growing else ""
    times = {who: [t[protocol] for t in by_size] for who, by_size in timed.items()}
    pixels = [c.shape[2] * c.shape[3] for c in growing]
    jumps = {
        who: [
            {"from": a, "to": b, "relative": (ub / ua) / (b / a)}
            for a, b, ua, ub in zip(pixels, pixels[1:], us, us[1:], strict=False)
        ]
        for who, us in times.items()
    }
    return {
        "layer": str(growing[0]) if growing else "",
        "pixels": pixels,
        "times_us": times,
        "largest_jump": {
            who: max(found, key=lambda jump: jump["relative"])
            for who, found in jumps.items()
            if found
        },
    }


def table(result: dict[str, Any]) -> str:
    """One line for each case: microseconds of ours, and how much longer the others take."""
    lines = [
        f"{result['device']}; copy {result['copy_gbps']:.0f} GB/s",
        f"{'case':62} {'dir':8} {'ours us':>10} {'% copy':>7}  others / ours",
    ]
    for entry in result["cases"]:
        times = entry["times_us"]
        protocol = plot.main_protocol(times["ours"])
        mine = times["ours"][protocol]
        others = "  ".join(
            f"{who} {by_protocol[protocol] / mine:.2f}"
            for who, by_protocol in times.items()
            if who != "ours" and protocol in by_protocol
        )
        percent = entry["percent_of_copy"]["ours"][protocol]
        lines.append(
            f"{entry['name']:62} {entry['direction']:8} {mine:10.1f} {percent:6.0f}%  {others}"
        )
        lines += [f"    {who}: {why}" for who, why in entry["absent"].items()]
    for protocol, groups in result["geometric_means"].items():
        lines.append(f"geometric means of others / ours, {protocol}")
        for group, by_name in groups.items():
            words = "  ".join(f"{who} {ratio:.2f}" for who, ratio in by_name.items())
            lines.append(f"    {group:44} {words}")
    for who, jump in result["growth"].get("largest_jump", {}).items():
        lines.append(
            f"largest jump, {who}: {jump['relative']:.2f} x linear, from {jump['from']} to "
            f"{jump['to']} pixels"
        )
    absent = [name for name, found in result["peers"].items() if found == "not installed"]
    if absent:
        lines.append(f"not installed: {', '.join(absent)}")
    return "\n".join(lines)


if __name__ == "__main__":
    with answering_requests():
        sys.exit(main())
