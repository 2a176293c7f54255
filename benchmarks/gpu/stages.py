"""The stages of `python -m benchmarks.gpu`: what their items are, and how a worker runs one."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, host, norms, peers, plot, timing, tune
from benchmarks.cases import Case
from benchmarks.gpu import checks, right
from benchmarks.gpu.engine import Context, Result

# Behind the goals: forward + backward with an activation, in shares of the copy bandwidth, and
# times faster than the others.
GOALS = [
    Case("instance", (8, 64, 256, 256), "relu"),
    Case("instance", (8, 64, 256, 256), "relu", "bf16"),
    Case("conditional_batch", (64, 256, 32, 32), "relu"),
    Case("conditional_batch", (64, 256, 32, 32), "relu", "bf16"),
]
PERCENT, TIMES_EAGER, TIMES_COMPILE = 90.0, 2.5, 1.3
COMPILED = 8  # cases beside torch.compile, which takes seconds for each
WITHIN = 30.0  # seconds for the plans of one case
PUBLISHED, PEERS, HOST, GROWTH = "published ", "peers, ", "host cost, ", "growth"
# Variants of a step that need not run.
OPTIONAL = ("tf32+graph", "checkpointing", "compile")


# ---- right


def right_items(context: Context) -> list[str]:
    every = right.combinations()
    plain = [str(c) for c in every if c.dtype == "fp32" and c[2:] in PLAIN]
    rest = [str(c) for c in (right.few(every, 24) if context.rehearsed else every)]
    # Their kernels, compiled by many workers here, are ready when one worker times them.
    published = [f"{PUBLISHED}{c}" for c in _published(context)]
    return [*plain, *published, *checks.ITEMS, *(name for name in rest if name not in plain)]


PLAIN = [("nchw", plan, "none") for plan in right.PLANS]
LARGE = [name for name in checks.ITEMS if "past 2^31" in name]


def run_right(name: str, context: Context) -> Result:
    shapes = right.TINY if context.rehearsed else (right.EVEN, right.UNEVEN)
    try:
        if name in checks.ITEMS:
            return checks.run(name, checks.Place(context.device, context.rehearsed))
        if name.startswith(PUBLISHED):
            known = {str(c): c for c in _published(context)}
            return {"wrong": _fault(known[name.removeprefix(PUBLISHED)], context)}
        return {"wrong": right.check(right.Combination(*name.split()), context.device, shapes)}
    except torch.OutOfMemoryError:
        if name not in LARGE and not name.startswith(PUBLISHED):
            raise
        return {"skipped": "too little memory beside the other workers"}
    finally:
        torch.cuda.empty_cache()  # what one worker keeps the others lack


def _published(context: Context) -> list[Case]:
    every = [c for c in timed_cases(context) if (c.epilogue, c.layout) == ("relu", "nchw")]
    return every[:1] if context.rehearsed else every


def _fault(case: Case, context: Context) -> str:
    """What ours gets wrong, in words."""
    t = cases.tensors(case, context.device)
    return cases.wrong(case, cases.errors(case, t, functools.partial(cases.ours, case, t)))


# ---- fast


def timed_cases(context: Context) -> list[Case]:
    """The goals, the published shapes with a ReLU, in NCHW first, then every other epilogue."""
    if context.rehearsed:
        return cases.quick_cases()
    every = cases.cuda_cases()
    first = [c for c in every if c.epilogue == "relu" and c.layout == "nchw"]
    ends = [c for c in first if c.op != "instance" or c.shape[0] in (1, 8)]
    last = [c for c in every if c.epilogue == "relu" and c.layout == "channels_last"]
    return list(dict.fromkeys([*GOALS, *ends, *last, *first, *every]))


def fast_items(context: Context) -> list[str]:
    """Peers stand beside a goal in an item of their own: one that crashes takes no goal along."""
    small = host.CASES[:1] if context.rehearsed else host.CASES
    any_peer = context.rehearsed or set(peers.installed().values()) != {"not installed"}
    first = [n for c in goals(context) for n in (str(c), f"{PEERS}{c}")[: 1 + any_peer]]
    every = [str(c) for c in timed_cases(context)[len(goals(context)) :]]
    cut = len(every) if context.rehearsed else 16
    return [*first, *(f"{HOST}{c}" for c in small), *every[:cut], GROWTH, *every[cut:]]


def goals(context: Context) -> list[Case]:
    return timed_cases(context)[:1] if context.rehearsed else GOALS


@functools.cache
def _copy(device: str, quick: bool) -> float:
    return timing.copy_bandwidth(device, quick)


def run_fast(name: str, context: Context) -> Result:
    device, quick = context.device, context.rehearsed
    if name == GROWTH:
        growing = cases.growth_cases(quick)[: 2 if quick else None]
        if refused := norms.check(growing, device):
            return {"wrong": "; ".join(f"{case}: {words}" for case, words in refused.items())}
        options = ["--device", device, *(["--quick"] if quick else [])]
        return norms.growth(growing, norms.arguments(options))
    known = timed_cases(context)
    bare = name.removeprefix(HOST).removeprefix(PEERS)
    case = next(c for c in [*known, *host.CASES] if str(c) == bare)
    if fault := _fault(case, context):
        return {"wrong": fault}
    if name.startswith(HOST):
        return {"host": {d: _clocked(case, d, context) for d in norms.DIRECTIONS}}
    copy = {"copy_gbps": _copy(device, quick)}
    beside = name.startswith(PEERS)
    compiled = not beside and known.index(case) < (1 if quick else COMPILED)
    alone = case in goals(context) and not beside
    with mock.patch.object(peers, "build", lambda *_: {}) if alone else nullcontext():
        return copy | {"entries": norms.measure(case, copy, device, 0.05, compiled)}


def _clocked(case: Case, direction: str, context: Context) -> dict[str, dict[str, float]]:
    t = cases.tensors(case, context.device)
    runs, failed = norms.contestants(case, t, direction, compiled=False)
    return norms.clocked(runs, failed, context.device, 0.05)


def rehearsed_clocks() -> Any:
    """GPU clocks, on the stand-ins, with few repetitions."""

    def clocked(runs: Any, failed: Any, device: str, seconds: float) -> Any:
        return timing.time_cuda(runs, failed, device)

    return (
        mock.patch.multiple(timing, REPEATS=1, TURNS=1, EVENTS=1),
        mock.patch.object(norms, "clocked", clocked),
        mock.patch.object(tune, "clocked", clocked),
    )


# ---- tuned


def missed(context: Context) -> list[tuple[float, str]]:
    """Float32 cases below the share of the copy bandwidth that is the goal, worst first; one for
    each kind of set that plans are chosen by."""
    results = timing.read(context.out / "fast.json").get("items", {})
    found: dict[str, tuple[float, str]] = {}
    for case in timed_cases(context):
        for entry in results.get(str(case), {}).get("entries", ()):
            shares = entry["percent_of_copy"]["ours"]
            percent, key = shares[plot.main_protocol(shares)], tune.key(case)
            if entry["direction"] == "both" and case.dtype == "fp32" and percent < PERCENT:
                found[key] = min(found.get(key, (PERCENT, "")), (percent, str(case)))
    return sorted(found.values())


def tuned_items(context: Context) -> list[str]:
    if context.rehearsed:
        return [str(c) for c in tune.tuned_cases(True)]
    return [name for _, name in missed(context)]


def run_tuned(name: str, context: Context) -> Result:
    from gannorm.kernels import launch

    known = tune.tuned_cases(True) if context.rehearsed else timed_cases(context)
    case = next(c for c in known if str(c) == name)
    card = timing.device_name(context.device)
    best, gain, wrong = tune.tune(case, context.device, card, 0.05, WITHIN)
    if gain > tune.GAIN or context.rehearsed:
        path = context.out / "plans.json"
        plans = timing.read(path) or launch.tuned()
        plans.setdefault(card, {})[tune.key(case)] = list(best)
        timing.write(plans, path)
    return {"key": tune.key(case), "bounds": list(best), "gain": gain, "wrong": "; ".join(wrong)}


@dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the time
    limit: float  # seconds for one item
    items: Callable[[Context], list[str]]
    run: Callable[[str, Context], Result]
    many: bool = False  # workers, where nothing is timed


def _later(module: str, name: str) -> Any:
    """Items and runs of the stages that need Hydra, which the others are to be had without."""

    def items(context: Context) -> list[str]:
        return getattr(import_module(f"benchmarks.gpu.{module}"), f"{name}_items")(context)

    def run(item: str, context: Context) -> Result:
        return getattr(import_module(f"benchmarks.gpu.{module}"), f"run_{name}")(item, context)

    return items, run


STAGES = (
    Stage("right", 3.0, 150.0, right_items, run_right, many=True),
    Stage("run", 2.5, 120.0, *_later("whole", "run")),
    Stage("fast", 3.5, 150.0, fast_items, run_fast),
    Stage("tuned", 1.0, 90.0, tuned_items, run_tuned),
    Stage("step", 2.0, 150.0, *_later("whole", "step")),
    Stage("processes", 2.0, 240.0, *_later("several", "processes")),
)
