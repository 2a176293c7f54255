"""Clocks: interleaved medians on a CPU; events, wall time and graph replay on a GPU."""

import json
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gannorm
from gannorm.errors import RequestError
from gannorm.norms import cpu

Run = Callable[[], Any]
RESULTS = Path(__file__).parent / "results"
REPEATS = 20  # calls in a captured graph, and in a stretch of wall time
TURNS = 20  # replays of a graph, and twice the stretches of wall time
EVENTS = 50  # calls between events

CPU_PROTOCOL = (
    "wall: all contestants alternate in one loop, in another order each round; medians of single "
    "calls; memory that is freed stays with the process, as in training"
)
CUDA_PROTOCOL = (
    f"wall: {REPEATS} eager calls and one synchronization; events: eager calls between CUDA "
    f"events; graph: {REPEATS} calls captured in one CUDA graph and replayed; cold: a buffer of "
    "twice the L2 cache is zeroed before each call (its time, measured alone, is subtracted from "
    "a replay); warm: calls follow each other; medians"
)


def rounds(runs: dict[str, Run], seconds: float) -> int:
    """How often `runs` can take turns in `seconds`; 5 times at least, 300 at most."""
    began = time.perf_counter()
    for run in runs.values():
        run()
    return max(5, min(300, int(seconds / (time.perf_counter() - began))))


def time_cpu(runs: dict[str, Run], seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of a call, for each contestant: {"wall": median}.

    In an order of its own each round: who runs behind one that leaves cold caches and sleeping
    threads behind is another one each time.
    """
    for run in runs.values():
        run()
    samples: dict[str, list[int]] = {name: [] for name in runs}
    chance = random.Random(0)
    for _ in range(rounds(runs, seconds)):
        for name in chance.sample(list(runs), len(runs)):
            began = time.perf_counter_ns()
            runs[name]()
            samples[name].append(time.perf_counter_ns() - began)
    return {name: {"wall": statistics.median(s) / 1000} for name, s in samples.items()}


def _between_events(enqueue: Run, before: Run | None, repeats: int) -> float:
    """Median microseconds on the device, `before` not counted."""
    pairs = []
    for _ in range(repeats):
        if before is not None:
            before()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        enqueue()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1000 for a, b in pairs)


def captured(run: Run, repeats: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run` so many times in one graph, and what the last one returned: written by each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, last = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            last = run()
    return graph, last


def _replayed(run: Run) -> float:
    """Microseconds of one call in a replayed graph."""
    graph, _ = captured(run, REPEATS)
    graph.replay()
    elapsed = _between_events(graph.replay, None, TURNS)
    del graph
    return elapsed / REPEATS


def _wall(run: Run) -> float:
    samples = []
    for _ in range(max(1, TURNS // 2)):
        torch.cuda.synchronize()
        began = time.perf_counter_ns()
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
        samples.append((time.perf_counter_ns() - began) / 1000 / REPEATS)
    return statistics.median(samples)


def time_cuda(
    runs: dict[str, Run], failed: dict[str, str], device: str = "cuda"
) -> dict[str, dict[str, float]]:
    """Microseconds of a call, for each contestant, by protocol; `failed` takes the reasons."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    buffer = torch.empty(2 * cache, dtype=torch.uint8, device=device)
    flush, stream = buffer.zero_, torch.cuda.current_stream()
    flush_time = _replayed(flush)
    times = {}
    for name, run in runs.items():
        for _ in range(3):
            run()

        def cold(run: Run = run) -> None:
            flush()
            run()

        times[name] = {
            "wall": _wall(run),
            "events_warm": _between_events(run, None, EVENTS),
            "events_cold": _between_events(run, flush, EVENTS),
        }
        try:
            times[name]["graph_warm"] = _replayed(run)
            if (elapsed := _replayed(cold) - flush_time) > 0:
                times[name]["graph_cold"] = elapsed
            else:
                failed[f"{name}, graph_cold"] = "shorter than what was subtracted"
        except RuntimeError as error:  # not every sequence can be captured
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own current
            torch.cuda.synchronize()  # raises what has nothing to do with captures
            failed[f"{name}, graph"] = str(error).splitlines()[0]
    return times


def copy_bandwidth(device: str, quick: bool) -> float:
    """GB/s (reads + writes) of a copy from one large tensor to another on the device."""
    size = 2**24 if quick else 2**28 if device == "cpu" else 2**31
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    if device == "cpu":
        microseconds = time_cpu({"copy": copy}, 0.2 if quick else 3)["copy"]["wall"]
    else:
        copy()
        microseconds = _between_events(copy, None, 20)
    return 2 * size / microseconds / 1000


def resident(kind: str) -> float:
    """MB of this process: "RSS" now, or "HWM", the most so far; NaN where /proc tells nothing."""
    status = Path("/proc/self/status")
    text = status.read_text(encoding="ascii") if status.exists() else ""
    found = re.search(rf"^Vm{kind}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else math.nan


def use_device(device: str) -> None:
    """Ready for timings on `device`; RequestError where it is "cuda" and there is no GPU."""
    if device == "cpu":
        cpu.keep_memory()
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: torch finds no GPU here; take --device cpu")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8"))
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: str) -> dict[str, Any]:
    """What every result begins with."""
    return {
        "device": device_name(device),
        "date": date.today().isoformat(),
        "versions": {
            "gannorm": gannorm.__version__,
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "cuda": torch.version.cuda if device == "cuda" else None,
            "python": platform.python_version(),
        },
        "protocol": CUDA_PROTOCOL if device == "cuda" else CPU_PROTOCOL,
    }


def result_path(result: dict[str, Any], out: Path | None, prefix: str = "") -> Path:
    """--out, or a file named after the device and the day."""
    if out is not None:
        return out
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return RESULTS / f"{prefix}{slug}-{result['date']}.json"


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
