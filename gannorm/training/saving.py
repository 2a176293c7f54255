"""A run's checkpoints, written in spite of a disk that is full, away or read-only for a while."""

import time
from pathlib import Path
from typing import Any

from gannorm import parallel
from gannorm.errors import RunError
from gannorm.training import checkpoint
from gannorm.training.monitor import Monitor
from gannorm.training.report import tell
from gannorm.training.run import BEST, Run

PAUSES = (0.5, 1.0, 2.0, 3.0, 3.5)  # seconds between tries


def save(run: Run, monitor: Monitor, last: bool) -> None:
    """The checkpoint of this step; then the oldest are deleted. Where there is no room for it,
    training goes on to the next one.

    Raises:
        NotFinite: a loss since the last log is NaN or infinite; nothing is written.
        RunError: it was the run's `last` and cannot be written.
    """
    run.meter.share()
    run.check_finite()
    path = monitor.run_dir / "checkpoints" / f"step_{run.step:08d}.pt"
    fault = parallel.from_first(lambda: _save(run, monitor, path))
    if fault is None:
        run.saved, run.saved_step = path, run.step
    elif last:
        monitor.close()
        raise RunError(f"the last checkpoint, {path}, cannot be written: {fault}")
    else:
        tell(f"{path} is given up; training goes on")


def _save(run: Run, monitor: Monitor, path: Path) -> str | None:
    """None, or why there is none, in words."""
    monitor.flush()
    before = "there is none before it"
    if run.saved is not None:
        before = f"the newest whole one is {run.saved}"
    error = attempt(path, run.state_dict(), before)
    if error is not None:
        return f"{error.strerror or error}; {before}"
    try:
        checkpoint.prune(monitor.run_dir, run.cfg.trainer.keep_checkpoints)
    except OSError as reason:
        tell(f"old checkpoints in {path.parent} cannot be deleted: {reason.strerror}")
    return None


def save_best(run: Run, run_dir: Path) -> bool:
    """The checkpoint of the best evaluation: whether it could be written."""
    path = run_dir / BEST
    written = attempt(path, run.state_dict(), "what was there stays") is None
    if not written:
        tell(f"{path} is given up; training goes on")
    return written


def attempt(path: Path, content: dict[str, Any], before: str) -> OSError | None:
    """Write a checkpoint, some times if need be: None, or what the disk said last."""
    for tries, pause in enumerate((0.0, *PAUSES)):
        time.sleep(pause)
        try:
            checkpoint.save(path, content)
        except OSError as error:
            failed = error
            if tries == 0:
                tell(
                    f"cannot write {path}: {error.strerror or error}; {before}; trying again for "
                    f"{sum(PAUSES):.0f} s"
                )
            continue
        if tries:
            tell(f"{path} is written now")
        return None
    return failed
