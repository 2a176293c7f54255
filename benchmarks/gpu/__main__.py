"""Run every stage; write what each item found as soon as it is known; a short table last.

    python -m benchmarks.gpu [--minutes 12] [--out DIR] [--stages right,run,...] [--rehearse]

right  every norm against float64: dtypes, layouts, plans, epilogues; streams, graphs, compile
run    60 steps of both default trainings, their losses beside the CPU's
fast   kernel times beside torch, torch.compile and peers; host cost; growing sizes
tuned  launch plans for the shapes that missed the goal
step   both published recipes, step by step, beside unfused networks
processes   two GPUs: synchronized norms and both default trainings on two processes

Exit code: 0 if all is right, 1 if something is wrong or failed, 2 for a wrong request, 130 when
interrupted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu import engine, stages
from benchmarks.gpu.engine import Report
from benchmarks.gpu.stages import STAGES, Context, Stage
from benchmarks.gpu.table import table
from gannorm.errors import RequestError, answering_requests

NAMES = [stage.name for stage in STAGES]
HYDRA = ("hydra", "omegaconf", "antlr4", "pydantic")
ONE_GPU = "two processes take two GPUs, and one is here"
NO_HYDRA = (
    "hydra-core is not installed; pip install hydra-core, or put its wheels on PYTHONPATH "
    "(docs/gpu.md)"
)
MOST_WORKERS = 14


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.worker:
        work(args)
        return 0
    unknown = set(args.stages) - set(NAMES)
    if unknown:
        raise RequestError(
            f"--stages {','.join(sorted(unknown))}: unknown; choose from {', '.join(NAMES)}"
        )
    if not args.rehearse and not torch.cuda.is_available():
        raise RequestError(
            "no GPU was found; --rehearse runs every stage on the CPU, at tiny sizes"
        )
    environment = timing.environment("cpu") if args.rehearse else asked("environment", args)
    out = args.out or timing.result_path(environment, None, "gpu-").with_suffix("")
    context = Context(out.resolve(), args.rehearse)
    context.out.mkdir(parents=True, exist_ok=True)
    reports = [
        Report(name, context.out / f"{name}.json", environment)
        for name in NAMES
        if name in args.stages
    ]
    for report in reports:  # those of an earlier run
        report.path.unlink(missing_ok=True)
    if "tuned" in args.stages:
        (context.out / "plans.json").unlink(missing_ok=True)
    code = 0
    try:
        run_all(reports, args, context)
    except KeyboardInterrupt:
        code = 130
    text = table(reports, environment, context)
    (context.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    summary = {
        r.stage: {"wrong": r.wrong, "failed": r.failed, "not_reached": len(r.not_reached)}
        for r in reports
    }
    timing.write(environment | {"stages": summary}, context.out / "summary.json")
    print(f"{text}\n\n{context.out}")
    return code or int(any(r.wrong or needed(r) for r in reports))


def needed(report: Report) -> dict[str, str]:
    """Failures that are faults: not every variant of a step has to run, and no peer."""
    if report.stage == "run":  # two items: what was cut off there is an answer that is missing
        return report.failed | dict.fromkeys(report.not_reached, "not reached")
    return {
        name: why
        for name, why in report.faults.items()
        if not name.startswith(stages.PEERS)
        and (report.stage != "step" or not name.endswith(stages.OPTIONAL))
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="for all stages together")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=NAMES,
                        metavar=",".join(NAMES))  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_all(reports: list[Report], args: argparse.Namespace, context: Context) -> None:
    """Every stage in turn; what one does not use of its share is the others'."""
    end = time.monotonic() + 60 * args.minutes
    todo = [(stage, report) for stage in STAGES for report in reports if report.stage == stage.name]
    for stage, report in list(todo):
        if reason := skipped(stage, args):
            report.items["all"] = {"skipped": reason}
            report.write()
            todo.remove((stage, report))
    for number, (stage, report) in enumerate(todo):
        left = max(0.0, end - time.monotonic())
        shares = sum(other.share for other, _ in todo[number:])
        deadline = time.monotonic() + left * stage.share / shares
        try:
            run_one(stage, report, args, context, deadline)
        except Exception as error:  # of this stage: the others run
            report.failed["the stage itself"] = f"{type(error).__name__}: {error}"
            report.write()


def skipped(stage: Stage, args: argparse.Namespace) -> str | None:
    """Why a stage cannot be run here."""
    if stage.name in ("run", "step", "processes") and not all(map(find_spec, HYDRA)):
        return NO_HYDRA
    if stage.name == "processes" and not args.rehearse and torch.cuda.device_count() < 2:
        return ONE_GPU
    return None


def run_one(
    stage: Stage, report: Report, args: argparse.Namespace, context: Context, deadline: float
) -> None:
    workers = 1
    if stage.many:
        workers = 2 if args.rehearse else max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 1))
    engine.run_stage(
        report, stage.items(context), command(stage.name, args, context.out),
        surroundings(args, stage.many), workers, deadline, stage.limit,
    )  # fmt: skip


def command(worker: str, args: argparse.Namespace, out: Path) -> list[str]:
    rehearsed = ["--rehearse"] if args.rehearse else []
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--worker",
        worker,
        "--out",
        str(out),
        *rehearsed,
    ]


def surroundings(args: argparse.Namespace, many: bool = False) -> dict[str, str]:
    """A worker's environment; the interpreter is switched on or off before triton is imported."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    made["TRITON_INTERPRET"] = "1" if args.rehearse else "0"
    if many:  # of which each would start a pool of its own
        made["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if args.rehearse:
        made["OMP_NUM_THREADS"] = "1"
    return made


def asked(worker: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker says of the GPU, which this process leaves alone."""
    try:
        done = subprocess.run(
            command(worker, args, Path()), env=surroundings(args), input="environment\n",
            capture_output=True, text=True, check=False, timeout=engine.START,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RequestError(f"the GPU does not answer in {engine.START:.0f} s") from error
    if done.returncode or not done.stdout:
        raise RequestError(f"the GPU does not answer: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise RequestError(f"the GPU does not answer: {found['error']}")
    return found


# ---- a worker


def work(args: argparse.Namespace) -> None:
    threading.Thread(target=end_with_the_parent, args=(os.getppid(),), daemon=True).start()
    if args.worker == "environment":
        engine.serve(lambda _: timing.environment("cuda"))
        return
    stage = next(stage for stage in STAGES if stage.name == args.worker)
    context = Context(args.out, args.rehearse)
    with ExitStack() as stack:
        if args.rehearse:
            from benchmarks.gpu import rehearsal
            from gannorm import use_backend

            if stage.name != "run":  # whose networks would take minutes in the interpreter
                stack.enter_context(use_backend("triton"))
            for each in (
                rehearsal.rounding_to_nearest(), rehearsal.patching_once(),
                rehearsal.without_overflow_checks(), rehearsal.standing_in(),
                *stages.rehearsed_clocks(),
            ):  # fmt: skip
                stack.enter_context(each)
        engine.serve(lambda name: stage.run(name, context))


def end_with_the_parent(parent: int) -> None:
    """A worker whose parent was killed, and that hangs besides, is not left behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def interrupted(*_: Any) -> None:
    """SIGTERM ends the command as Ctrl-C does: with the table of what there is."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    if "--worker" not in sys.argv:
        signal.signal(signal.SIGTERM, interrupted)
    with answering_requests():
        sys.exit(main())
