"""Write kernels/plans.json: for this GPU, the launch plans that are faster than the formula's.

    python -m benchmarks.tune                    # every published shape
    python -m benchmarks.tune --only instance

For each kind of statistics set the kernels run, forward + backward, under several bounds (what
registers hold, tile, programs for each processor, warps, tiles under way); each plan is first held
against the float64 oracle. Bounds enter the table if they are faster than the formula's by more
than GAIN. Nothing is tuned when the norms are used.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from benchmarks import cases, timing
from benchmarks.cases import Case
from benchmarks.norms import _directed, clocked
from benchmarks.plot import shared_protocol
from gannorm import use_backend
from gannorm.errors import RequestError, answering_requests
from gannorm.kernels import launch
from gannorm.kernels.launch import Bounds, bounds_key, plan

GAIN = 1.03


def tuned_cases(quick: bool) -> list[Case]:
    """One for each kind of set: float32, whose statistics bf16 has too, the most used epilogue."""
    if quick:
        return [Case("instance", (2, 4, 16, 16), "relu")]
    grown = [c for c in cases.growth_cases(False) if c.shape[2] & (c.shape[2] - 1) == 0]
    published = [c for c in cases.cuda_cases() if c.dtype == "fp32" and c.epilogue == "relu"]
    by_key = {key(case): case for case in [*grown, *published]}
    return list(by_key.values())


def _sets(case: Case) -> tuple[bool, int, int, int]:
    """Across the batch, planes of a set, sets of a sample or in all, elements of a plane."""
    n, c, h, w = case.shape
    if case.op in ("batch", "conditional_batch"):
        return True, n, c, h * w
    groups = case.groups or c
    return False, c // groups, groups, h * w


def key(case: Case) -> str:
    batch, planes, sets, size = _sets(case)
    total = sets if batch else sets * case.shape[0]
    return bounds_key(batch, total, planes, size, 4, case.layout == "channels_last")


def candidates(case: Case, processors: int) -> list[Bounds]:
    """Bounds that make different plans, the formula's first."""
    batch, planes, sets, size = _sets(case)
    formula = launch.formula(batch)
    persistent = [formula._replace(warps=w) for w in (0.5, 2.0)]
    tiles = (8192, 16384, 32768)
    looped = [
        Bounds(0, tile, launch.WAVES, warps, stages)
        for tile, warps, stages in product(tiles, (1.0, 2.0), (1, 3))
    ]
    split = [Bounds(0, *rest, 0) for rest in product(tiles, (4, 8, 16), (0.5, 1.0, 2.0))]
    found: dict[launch.Plan, Bounds] = {}
    for bounds in [formula, *persistent, *looped, *split]:
        last = case.layout == "channels_last"
        made = plan(batch, case.shape[0], planes, sets, size, 4, last, False, processors, bounds)
        found.setdefault(made, bounds)
    return list(found.values())


@contextmanager
def under(bounds: Bounds, device_name: str, case: Case) -> Iterator[None]:
    """The case's launches go by `bounds` inside the block."""
    lines = launch.tuned().setdefault(device_name, {})
    before = lines.get(key(case))
    lines[key(case)] = list(bounds)
    launch.forget()
    try:
        yield
    finally:
        lines.pop(key(case))
        if before is not None:
            lines[key(case)] = before
        launch.forget()


def tune(
    case: Case, device: str, device_name: str, seconds: float, within: float = math.inf
) -> tuple[Bounds, float, list[str]]:
    """The fastest bounds, how many times faster than the formula's they are, and which were wrong.

    within: seconds after which no further bounds are tried, so that the order is one of chance.

    Raises:
        RuntimeError: the formula's own plan is wrong.
    """
    began = time.monotonic()
    t = cases.tensors(case, device)
    run = _directed(partial(cases.ours, case, t), t, "both")
    times: dict[Bounds, dict[str, float]] = {}
    wrong = []
    formula, *others = candidates(case, launch._processors(t.x.device))
    for bounds in [formula, *random.Random(0).sample(others, len(others))]:
        if times and time.monotonic() - began > within:
            break
        with under(bounds, device_name, case):
            try:
                fault = cases.wrong(case, cases.errors(case, t, partial(cases.ours, case, t)))
            except OutOfResources:  # not on this GPU
                continue
            if fault:
                wrong.append(f"{case} under {bounds}: {fault}")
                if bounds == formula:
                    raise RuntimeError(wrong[0])
                continue
            times[bounds] = clocked({"ours": run}, {}, device, seconds)["ours"]
    protocol = shared_protocol(list(times.values()))
    best = min(times, key=lambda bounds: times[bounds][protocol])
    return best, times[formula][protocol] / times[best][protocol], wrong


def main(argv: list[str] | None = None) -> None:
    """Tune, print a line for each case, write the table after each.

    Raises:
        RequestError: no GPU, or no case of that name.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name has this")
    parser.add_argument("--quick", action="store_true", help="one small case, interpreted too")
    parser.add_argument("--out", type=Path, metavar="FILE.json", default=launch.PLANS)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise RequestError("plans are tuned on the GPU they are for, and none was found")
    todo = [case for case in tuned_cases(args.quick) if args.only in str(case)]
    if not todo:
        raise RequestError(f"--only {args.only}: no case has this in its name")
    name = torch.cuda.get_device_name() if device == "cuda" else device
    with use_backend("triton"):
        for case in tqdm(todo, unit="case"):
            best, gain, wrong = tune(case, device, name, 0.05)
            for words in wrong:
                tqdm.write(f"wrong: {words}", sys.stderr)
            lines = launch.tuned().setdefault(name, {})
            lines.pop(key(case), None)
            if gain > GAIN:
                lines[key(case)] = list(best)
            timing.write(launch.tuned(), args.out)
            tqdm.write(f"{key(case)}: {gain:.2f} x the formula's speed with {best}", sys.stdout)


if __name__ == "__main__":
    with answering_requests():
        main()
