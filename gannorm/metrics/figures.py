"""The figures of sample quality a run can have: `FIGURES`.

A figure of one's own is an entry more: `FIGURES["mine"] = Figure(of, needs)`; it is then measured
wherever there is what it needs, logged, charted, and a choice of `metrics.best`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from gannorm.metrics import distances
from gannorm.metrics.features import Embedded
from gannorm.metrics.observations import Observations
from gannorm.metrics.similarity import SMALLEST, feature_distance, psnr, ssim

Needs = Literal["features", "kinds", "labels", "classes", "cycle", "counterparts"]


class Comparison:
    """Generated images beside real ones: what figures of whole sets are made of."""

    def __init__(self, real: Observations, generated: Observations) -> None:
        self.real, self.generated = real, generated

    @cached_property
    def neighbourhoods(self) -> dict[str, float]:
        return distances.neighbourhoods(self.real.features, self.generated.features)


@dataclass
class Pairs:
    """Images and what each should look like, both (N, C, H, W), and a classifier of the latter."""

    images: Tensor
    target: Tensor
    reader: Embedded | None = None

    def feature_distance(self) -> Tensor:
        assert self.reader is not None
        return feature_distance(self.reader.maps(self.images), self.reader.maps(self.target))


@dataclass(frozen=True)
class Figure:
    """A figure of sample quality.

    Attributes:
        of: of a `Comparison` a number, of `Pairs` the numbers (N,) that are averaged.
        needs: "features": of enough images of both sides; "kinds": and of an extractor that knows
            kinds of images; "labels"; "classes": figures of each
            class, of which it is the mean; "cycle": pairs of an image and what a translation back
            makes of it; "counterparts": pairs of a translation and the true one.
        higher: whether more is better.
        compared: a column of TensorBoard's table of runs.
        form: how it is printed.
        smallest: pixels of an image below which it is not measured.
    """

    of: Callable[[Any], Any]
    needs: Needs
    higher: bool = False
    compared: bool = False
    form: str = ".4f"
    smallest: int = 1


def _neighbourhood(name: str) -> Callable[[Comparison], float]:
    return lambda sides: sides.neighbourhoods[name]


def _fid(sides: Comparison) -> float:
    return distances.fid(sides.real.features, sides.generated.features)


def _kid(sides: Comparison) -> float:
    return distances.kid(sides.real.features, sides.generated.features)


def _accuracy(sides: Comparison) -> float:
    predicted, labels = sides.generated.predicted, sides.generated.labels
    assert predicted is not None and labels is not None
    return float((predicted == labels).double().mean())


def _l1(pairs: Pairs) -> Tensor:
    return (pairs.images - pairs.target).abs().mean((1, 2, 3))


def _psnr(pairs: Pairs) -> Tensor:
    return psnr(pairs.images, pairs.target)


def _ssim(pairs: Pairs) -> Tensor:
    return ssim(pairs.images, pairs.target)


# What is looked at first stands first.
FIGURES: dict[str, Figure] = {
    "fid": Figure(_fid, "features", compared=True),
    "accuracy": Figure(_accuracy, "labels", higher=True, compared=True, form=".1%"),
    "coverage": Figure(_neighbourhood("coverage"), "features", higher=True, compared=True),
    "precision": Figure(_neighbourhood("precision"), "features", higher=True, compared=True),
    "recall": Figure(_neighbourhood("recall"), "features", higher=True, compared=True),
    "density": Figure(_neighbourhood("density"), "features", higher=True),
    "kid": Figure(_kid, "features", compared=True),
    "inception_score": Figure(
        lambda sides: distances.inception_score(sides.generated.logits), "kinds", higher=True
    ),
    "class_fid": Figure(_fid, "classes"),
    "psnr": Figure(_psnr, "counterparts", higher=True),
    "ssim": Figure(_ssim, "counterparts", higher=True, smallest=SMALLEST),
    "feature_distance": Figure(Pairs.feature_distance, "counterparts"),
    "cycle_l1": Figure(_l1, "cycle"),
    "cycle_psnr": Figure(_psnr, "cycle", higher=True),
    "cycle_ssim": Figure(_ssim, "cycle", higher=True, smallest=SMALLEST),
}


def of_sets(real: Observations, generated: Observations) -> dict[str, float]:
    """Every figure of whole sets: those on features where both sides have enough images to have
    neighbours, those on labels where there are labels."""
    enough = min(len(real), len(generated)) > distances.NEIGHBOURS
    labelled = generated.predicted is not None and generated.labels is not None
    kinds = enough and generated.logits is not None
    sides = Comparison(real, generated)
    has = {"features": enough, "kinds": kinds, "labels": labelled}
    return {name: figure.of(sides) for name, figure in FIGURES.items() if has.get(figure.needs)}


def of_pairs(pairs: Pairs, needs: Needs) -> dict[str, Tensor]:
    """Every figure of pairs that needs just this: each pair's (N,)."""
    size = min(pairs.images.shape[-2:])
    return {
        name: figure.of(pairs)
        for name, figure in FIGURES.items()
        if figure.needs == needs and size >= figure.smallest
    }


def base(name: str) -> str:
    """The figure of a logged name, which may end in a direction (fid_AtoB, cycle_l1_A) or a class
    (class_fid/3)."""
    name = name.partition("/")[0]
    stem, _, end = name.rpartition("_")
    return stem if end in ("A", "B", "AtoB", "BtoA") else name


def average(figure: str, quality: dict[str, float]) -> float | None:
    """The figure `figure`, or the mean over both directions (figure_AtoB, ...) of a translation."""
    values = [v for name, v in quality.items() if "/" not in name and base(name) == figure]
    return sum(values) / len(values) if values else None
