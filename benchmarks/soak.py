"""Whether long trainings grow: memory and open files of both default runs, second by second.

    python -m benchmarks.soak --minutes 40

Both tasks train in turns, each in one run folder, with a data worker and evaluation, samples and
checkpoints far more often than by default. Every ten minutes SIGTERM ends the run, which goes on
later with resume=auto: a life of its process. Of a life's process and workers together are read,
once a second:

memory       what they hold, pages that they share counted once; not those of files, which come and
             go with others' use (Pss_Anon and Pss_Shmem, /proc/PID/smaps_rollup)
descriptors  open files, pipes, sockets (/proc/PID/fd)

The first part of a life is its warm-up. Behind it stand windows of time, each with several
evaluations: a window's peak of memory has to be within 2% of the others', and its usual number of
descriptors the same. Writes JSON and a plot (--plot). Linux alone.

The runs write their events by protobuf's Python code. Its compiled one has the C library return
all free pages (malloc_trim) each few thousand messages: 20 to 100 MB go and come back, by chance
more or less, and what a run itself holds cannot be seen to 2% behind that. To see memory as it is
by default: PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=upb before the command.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, mode
from typing import Any

from tqdm import tqdm

from benchmarks import timing
from gannorm.errors import RequestError, answering_requests

ROOT = Path(__file__).parents[1]
TASKS = ("cyclegan", "resblock_gan")
OFTEN = [
    "trainer.steps=1000000", "trainer.device=cpu", "trainer.log_every=5", "trainer.sample_every=10",
    "trainer.eval_every=20", "trainer.checkpoint_every=10", "data.num_workers=1", "resume=auto",
]  # fmt: skip
ENVIRONMENT = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"} | os.environ
LIFE, WINDOWS = 600.0, 4  # seconds of a life; parts of it, the first of which is the warm-up
WITHIN = 0.02
ENDED = 128 + signal.SIGTERM
PATIENCE = 30.0  # seconds that a run has to end
MB = 1e6


@dataclass
class Life:
    """What was read of one process and its workers, once a second; memory in MB.

    began: seconds since the soak's start.
    """

    task: str
    began: float
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    steps: tuple[int, int] = (0, 0)  # before and behind it


# ---- read


def tree(process: int) -> Iterator[int]:
    """A process and all that it started."""
    yield process
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def held(process: int) -> float:
    """MB of memory, a shared page in equal parts by those who share it."""
    words = [
        line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    ]
    sizes = [int(size) for name, size, *_ in words if name in ("Pss_Anon:", "Pss_Shmem:")]
    if len(sizes) != 2:
        raise ValueError(f"/proc/{process}/smaps_rollup lacks Pss_Anon or Pss_Shmem")
    return sum(sizes) * 1024 / MB


def read(life: Life, process: int, seconds: float) -> None:
    """Add a reading, unless a process of the tree ends meanwhile."""
    try:
        every = list(tree(process))
        memory = sum(map(held, every))
        descriptors = sum(len(os.listdir(f"/proc/{each}/fd")) for each in every)
    except (OSError, ValueError):
        return
    life.seconds.append(round(seconds, 1))
    life.memory.append(round(memory, 1))
    life.descriptors.append(descriptors)
    life.processes.append(len(every))


def steps_of(folder: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    names = sorted((folder / "checkpoints").glob("step_*.pt"))
    return int(names[-1].stem.removeprefix("step_")) if names else 0


def live(task: str, folder: Path, seconds: float, began: float) -> Life:
    """Begin or continue the run in `folder`, and end it by SIGTERM after so many seconds.

    Raises:
        RuntimeError: it ends by itself, otherwise than it should, or leaves a worker.
    """
    life, before = Life(task, round(time.monotonic() - began, 1)), steps_of(folder)
    said = folder.with_suffix(".txt")
    command = [sys.executable, "train.py", f"model={task}", *OFTEN, f"hydra.run.dir={folder}"]
    with said.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out)
        start, workers = time.monotonic(), set[int]()
        try:
            while (passed := time.monotonic() - start) < seconds and process.poll() is None:
                read(life, process.pid, passed)
                time.sleep(max(0.0, 1.0 - (time.monotonic() - start - passed)))
            workers = set(tree(process.pid)) - {process.pid} if process.poll() is None else set()
            process.terminate()
            process.wait(PATIENCE)
        finally:
            process.kill()
    if process.returncode != ENDED or any(Path(f"/proc/{each}").exists() for each in workers):
        raise RuntimeError(
            f"{task} ended with {process.returncode} (not {ENDED}), or left one of its workers "
            f"{sorted(workers)}: {said.read_text()[-2000:]}"
        )
    life.steps = before, steps_of(folder)
    return life


# ---- judge


def windows(life: Life, total: float) -> list[slice]:
    """A life's readings in parts of equal time, behind the first, which is the warm-up."""
    ends = [sum(s < total * k / WINDOWS for s in life.seconds) for k in range(1, WINDOWS + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def judged(life: Life, total: float) -> dict[str, Any]:
    """peaks: of memory, by window; spread: the highest's share above the lowest; descriptors: the
    usual number by window; flat: whether both are as they should be."""
    parts = windows(life, total)
    peaks = [max(life.memory[part]) for part in parts]
    usual = [mode(sorted(life.descriptors[part])) for part in parts]
    spread = max(peaks) / min(peaks) - 1
    return {
        "task": life.task, "steps": life.steps, "peaks_mb": peaks, "spread": round(spread, 4),
        "medians_mb": [median(life.memory[part]) for part in parts], "descriptors": usual,
        "flat": len(parts) == WINDOWS - 1 and spread <= WITHIN and len(set(usual)) == 1,
    }  # fmt: skip


def table(verdicts: list[dict[str, Any]]) -> str:
    lines = ["| life | steps | peaks of memory, MB | spread | descriptors | flat |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for number, found in enumerate(verdicts, 1):
        first, last = found["steps"]
        lines.append(
            f"| {number}: {found['task']} | {first} to {last} | "
            f"{', '.join(f'{peak:.0f}' for peak in found['peaks_mb'])} | {found['spread']:.1%} | "
            f"{', '.join(map(str, found['descriptors']))} | {'yes' if found['flat'] else 'NO'} |"
        )
    return "\n".join(lines)


def draw(lives: list[Life], total: float, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(11, 6), sharex=True)
    colours = dict(zip(TASKS, ("tab:blue", "tab:orange"), strict=True))
    for number, life in enumerate(lives):
        at = [(life.began + s) / 60 for s in life.seconds]
        label = life.task if number < len(TASKS) else None
        for axis, values in zip(axes, (life.memory, life.descriptors), strict=True):
            axis.plot(at, values, color=colours[life.task], linewidth=0.8, label=label)
            warm = life.began / 60, (life.began + total / WINDOWS) / 60
            axis.axvspan(*warm, color="black", alpha=0.06, linewidth=0)
        for part in windows(life, total):
            peak = max(life.memory[part])
            axes[0].hlines(peak, at[part.start], at[part.stop - 1], color="black", linewidth=1.2)
    axes[0].set(ylabel="MB, process and workers", title=title)
    axes[1].set(ylabel="open descriptors", xlabel="minutes; grey: warm-up of a process")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def packed(life: Life) -> dict[str, Any]:
    """A series in a line."""
    return {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in asdict(life).items()}


# ---- the command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--life", type=float, default=LIFE, metavar="SECONDS")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="for the runs; else removed")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    if not Path("/proc/self/smaps_rollup").exists():
        raise RequestError("memory is read from /proc/PID/smaps_rollup, which Linux alone has")
    result = timing.environment("cpu") | {
        "protocol": f"{' '.join(OFTEN)}; {args.life:.0f} s a life, then SIGTERM; readings once a "
        f"second; warm-up: a life's first of {WINDOWS} parts; protobuf: "
        f"{ENVIRONMENT['PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION']}",
    }
    path, lives = timing.result_path(result, args.out, "soak-"), list[Life]()
    began, count = time.monotonic(), max(1, round(args.minutes * 60 / args.life))
    with tempfile.TemporaryDirectory(prefix="gannorm-soak-") as own:
        folders = args.runs or Path(own)
        folders.mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(count), unit="life"):
            task = TASKS[number % len(TASKS)]
            lives.append(live(task, folders / task, args.life, began))
            result["verdicts"] = [judged(life, args.life) for life in lives]
            result["lives"] = [packed(life) for life in lives]
            timing.write(result, path)
    if args.plot:
        draw(lives, args.life, f"{result['device']}, {result['date']}", args.plot)
    print(f"{result['device']}\n\n{table(result['verdicts'])}\n\n{path}")
    return 0 if all(found["flat"] for found in result["verdicts"]) else 1


if __name__ == "__main__":
    with answering_requests():
        sys.exit(main())
