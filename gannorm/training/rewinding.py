"""A loss or gradient that is no number ends a run, or sends it back to its last checkpoint."""

from pathlib import Path
from typing import Any, NoReturn

from gannorm import parallel
from gannorm.errors import RunError
from gannorm.training import checkpoint
from gannorm.training.monitor import Monitor
from gannorm.training.nonfinite import NotFinite
from gannorm.training.report import say
from gannorm.training.run import Run
from gannorm.training.saving import save


def give_up(run: Run, monitor: Monitor, fault: NotFinite) -> NoReturn:
    """End the run for a number that is none."""
    trainer = run.cfg.trainer
    monitor.scalars(run.step, {"health/not_finite": 1.0})
    monitor.text("health/not_finite", str(fault), run.step)
    monitor.close()
    after = f" (after {run.task.halvings} rewinds)" if run.task.halvings else ""
    raise FloatingPointError(
        f"{fault}{after}; lower optim.lr_g and optim.lr_d, set optim.clip_norm=1, or use a wider "
        f"trainer.precision than {trainer.precision}; checkpoints before this step are kept"
    ) from None


def _newest(run_dir: Path) -> dict[str, Any]:
    path = checkpoint.newest_whole(run_dir)
    if path is None:
        raise RunError(f"{run_dir}/checkpoints, which the run would go back to, is empty")
    checkpoint.set_aside(run_dir, path)
    return checkpoint.of_a_run(path)


def go_back(run: Run, monitor: Monitor, fault: NotFinite) -> None:
    """To the run's last checkpoint, with half the learning rates; it then holds these."""
    failed = run.step
    run.rewind(parallel.from_first(lambda: _newest(monitor.run_dir)))
    count = run.task.halvings
    text = (
        f"{fault}; back to step {run.step} with {0.5**count:.3g} of the learning rates "
        f"(rewind {count} of at most {run.cfg.trainer.nonfinite_limit})"
    )
    say(f"warning: {text}")
    monitor.restart(run.step)
    run.notes = {"rewound_from": failed, "reason": text}  # with the next figures
    monitor.text("health/rewinds", text, run.step)
    save(run, monitor, last=False)
