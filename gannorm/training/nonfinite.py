"""A loss or gradient that is NaN or infinite: where it began, and which steps are left out for it.

`Task._descend` has then left the weights as they were.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from gannorm import parallel
from gannorm.data import Batch
from gannorm.diagnostics.nonfinite import first_nonfinite
from gannorm.norms.sync import suspended
from gannorm.tasks import Task
from gannorm.training.options import eagerly


class NotFinite(FloatingPointError):
    """Of the steps up to one that was logged; its text says which figure, and where it began."""


class Skips:
    """Counts the steps with a loss or gradient that is not finite, on the device: nobody waits.

    judged: of which figures; fp16's gradients are not, which find its loss scale.
    """

    def __init__(self, judged: Callable[[str], bool]) -> None:
        self.judged = judged
        self.counts: Tensor | None = None  # since the last reading, and in a row

    def left_out(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a step, or as many zeros."""
        values = torch.stack([value.float() for value in losses.values()])
        judged = torch.stack([v.float() for name, v in losses.items() if self.judged(name)])
        good = judged.isfinite().all()
        bad = (~good).double()
        if self.counts is None:
            self.counts = torch.zeros(2, dtype=torch.float64, device=judged.device)
        since, row = self.counts.to(judged.device)
        self.counts = torch.stack([since + bad, (row + 1) * bad])
        return dict(zip(losses, torch.where(good, values, 0.0), strict=True))

    def mean(self) -> float:
        """How many since the last reading, of each process on average."""
        return 0.0 if self.counts is None else float(parallel.means([self.counts])[0][0])

    def share(self) -> None:
        """All processes have the same counts, for the one that saves them."""
        if self.counts is not None:
            since, row = parallel.gathered(self.counts[None]).unbind(1)
            self.counts = torch.stack([since.mean(), row.max()])

    def read(self) -> tuple[int, int]:
        """How many since the last reading, and how many of the latest in a row."""
        if self.counts is None:
            return 0, 0
        since, row = parallel.gathered(self.counts[None]).amax(0).tolist()
        self.counts = torch.tensor([0.0, row], dtype=torch.float64, device=self.counts.device)
        return math.ceil(since), int(row)


def skips(cfg: Any) -> Skips | None:
    """What counts the skipped steps, where they are to be skipped."""
    if cfg.trainer.on_nonfinite != "skip":
        return None
    fp16 = cfg.trainer.precision == "fp16"
    return Skips(lambda name: "/" not in name or not fp16)


def where_it_began(task: Task, taken: list[list[Batch]]) -> str:
    """Where `taken`, run again, first gives a NaN or infinity, in words; every process looks."""
    if not taken:
        return "before it was continued"
    found = None
    # Beside a CUDA graph's memory a second step may not fit.
    with suppress(torch.OutOfMemoryError), ExitStack() as stack:
        for inside in (task.norm_backend(), parallel.alone(), suspended(), eagerly(task)):
            stack.enter_context(inside)
        found = first_nonfinite(task.networks, lambda: task.train_step(taken))
    everywhere = parallel.joined([] if found is None else [(*found, parallel.rank())])
    if not everywhere:
        return "with every layer finite when run again"
    _, place, process = min(everywhere)
    return f"first in {place}" + (f", in process {process}" if parallel.world() > 1 else "")


def finite(
    figures: dict[str, float], step: int, task: Task, taken: list[list[Batch]], row: int = 0
) -> dict[str, float]:
    """The figures; less gradients that fp16 skipped to find its loss scale.

    row: steps skipped in a row.

    Raises:
        NotFinite: any other is NaN or infinite, or too many steps were skipped. No weight is, since
            `_descend` leaves them; so `taken`, the last batches, run again show where it begins.
    """
    trainer = task.cfg.trainer
    bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
    if trainer.precision == "fp16":
        bad = {name: value for name, value in bad.items() if name.startswith("loss/")}
    if bad:
        name, value = next(iter(bad.items()))
        raise NotFinite(f"{name} became {value} before step {step}, {where_it_began(task, taken)}")
    if row >= trainer.nonfinite_limit:
        raise NotFinite(
            f"{row} steps in a row up to step {step} had losses or gradients that are not finite, "
            f"{where_it_began(task, taken)} (trainer.nonfinite_limit={trainer.nonfinite_limit})"
        )
    kept = {name: value for name, value in figures.items() if math.isfinite(value)}
    return {**kept, "health/not_finite": 0.0}
