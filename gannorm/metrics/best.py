"""The best evaluation of a run so far: what best.pt holds, and when a run has stopped improving."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from gannorm.data import Data
from gannorm.errors import RequestError
from gannorm.metrics.distances import NEIGHBOURS
from gannorm.metrics.figures import FIGURES, average
from gannorm.schema import Config


@dataclass
class Best:
    """value: of the best evaluation, None before the first; since: evaluations after it."""

    value: float | None = None
    step: int = 0
    since: int = 0

    def update(self, figure: str, quality: dict[str, float], step: int) -> bool:
        """Whether this evaluation is the best so far; False too where `figure` is not measured."""
        value = average(figure, quality)
        if value is None:
            return False
        sign = 1 if FIGURES[figure].higher else -1
        if math.isfinite(value) and (self.value is None or sign * value > sign * self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False


def unmeasured(cfg: Config, data: Data, measures: Collection[str]) -> str | None:
    """Why a run does not measure `metrics.best`; None where it does.

    measures: what the task's evaluation can give a figure that needs it.

    Raises:
        RequestError: `metrics.patience` waits for it.
    """
    labelled = data.num_classes is not None
    held_out = [
        (len(test) // 2 if test is real else len(test))
        for test, real in zip(data.test, data.real, strict=True)
    ]
    asked = [] if cfg.metrics.samples is None else [cfg.metrics.samples]
    count = min([*held_out, *asked], default=NEIGHBOURS + 1)
    enough = count > NEIGHBOURS
    has = {
        "features": enough,
        "kinds": enough and (labelled or cfg.metrics.extractor == "inception"),
        "labels": labelled,
        "classes": labelled,
        "cycle": True,
        "counterparts": data.counterparts,
    }
    measured = {n for n, f in FIGURES.items() if f.needs in measures and has[f.needs]}
    figure, patience = cfg.metrics.best, cfg.metrics.patience
    if figure in measured:
        return None
    reason = (
        f"metrics.best={figure} is not measured with model={cfg.model.name} on data={cfg.data.name}"
    )
    if not enough:
        reason += f": {count} images (held out, or metrics.samples) must be more than {NEIGHBOURS}"
    elif not labelled:
        reason += ", which has no labels"
    if patience is not None:
        raise RequestError(
            f"{reason}; metrics.patience={patience} has nothing to wait for, choose another "
            f"metrics.best= {', '.join(sorted(measured))}"
        )
    return reason
