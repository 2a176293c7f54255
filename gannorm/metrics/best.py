"""The best evaluation of a run so far: what best.pt holds, and when a run has stopped improving."""

import math
from dataclasses import dataclass

from gannorm.config import Config, CycleGANConfig
from gannorm.data import Data
from gannorm.errors import RequestError
from gannorm.metrics.distances import NEIGHBOURS

HIGHER_IS_BETTER = {
    "inception_score", "precision", "recall", "density", "coverage", "accuracy", "cycle_psnr",
    "cycle_ssim", "psnr", "ssim",
}  # fmt: skip


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
        sign = 1 if figure in HIGHER_IS_BETTER else -1
        if math.isfinite(value) and (self.value is None or sign * value > sign * self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False


def average(figure: str, quality: dict[str, float]) -> float | None:
    """The figure `figure`, or the mean over both directions (figure_AtoB, ...) of a translation."""
    ends = ("", "_A", "_B", "_AtoB", "_BtoA")
    values = [quality[figure + end] for end in ends if figure + end in quality]
    return sum(values) / len(values) if values else None


def unmeasured(cfg: Config, data: Data) -> str | None:
    """Why a run does not measure `metrics.best`; None where it does.

    Raises:
        RequestError: `metrics.patience` waits for it.
    """
    labelled, translates = data.num_classes is not None, isinstance(cfg.model, CycleGANConfig)
    found: set[str] = set()
    enough = cfg.metrics.samples is None or cfg.metrics.samples > NEIGHBOURS
    if enough and (labelled or cfg.metrics.extractor.name == "inception"):
        found |= {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}
    if labelled:
        found |= {"accuracy"} if translates else {"accuracy", "class_fid"}
    if translates:
        found |= {"cycle_l1", "cycle_psnr", "cycle_ssim"}
    if data.counterparts:
        found |= {"psnr", "ssim", "feature_distance"}
    figure, patience = cfg.metrics.best.name, cfg.metrics.patience
    if figure in found:
        return None
    reason = (
        f"metrics.best={figure} is not measured with model={cfg.model.name} on data={cfg.data.name}"
    )
    if not enough:
        reason += f": metrics.samples={cfg.metrics.samples} must be more than {NEIGHBOURS}"
    elif not labelled and cfg.metrics.extractor.name == "embedded":
        reason += (
            ": metrics.extractor=embedded, a classifier, needs labels, "
            "metrics.extractor=inception does not"
        )
    if patience is not None:
        raise RequestError(
            f"{reason}; metrics.patience={patience} has nothing to wait for, choose another "
            f"metrics.best= {', '.join(sorted(found))}"
        )
    return reason
