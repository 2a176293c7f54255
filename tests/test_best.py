"""The best evaluation: by the right end of each figure, and patience."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from gannorm.config import typed
from gannorm.data import Data
from gannorm.errors import RequestError
from gannorm.metrics.best import Best, unmeasured
from gannorm.metrics.figures import FIGURES, average
from gannorm.tasks import TASKS

CONF = Path(__file__).parents[1] / "conf"


def test_lower_or_higher_is_better():
    low, high = Best(), Best()
    found = [(3.0, True), (3.0, False), (4.0, False), (2.0, True)]
    assert [low.update("fid", {"fid": v}, s) for s, (v, _) in enumerate(found)] == [
        better for _, better in found
    ]
    assert (low.value, low.step, low.since) == (2.0, 3, 0)
    assert [high.update("accuracy", {"accuracy": v}, 7) for v in (0.5, 0.4, 0.6, 0.1, 0.2)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert (high.value, high.since) == (0.6, 2)


def test_what_is_not_finite_is_never_the_best():
    best = Best()
    assert not best.update("fid", {"fid": float("nan")}, 1) and best.value is None
    assert best.update("fid", {"fid": 5.0}, 2)
    assert not best.update("fid", {"fid": float("nan")}, 3) and best.since == 1


def test_a_translation_counts_in_both_directions():
    quality = {"fid_AtoB": 1.0, "fid_BtoA": 3.0, "cycle_psnr_A": 20.0, "cycle_psnr_B": 10.0,
               "psnr_AtoB": 1.0, "fid_other": 9.0}  # fmt: skip
    assert average("fid", quality) == 2.0 and average("cycle_psnr", quality) == 15.0
    assert average("psnr", quality) == 1.0 and average("kid", quality) is None
    assert not Best().update("kid", quality, 1)


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", list(overrides)))


def missing(cfg, data: Data) -> str | None:
    return unmeasured(cfg, data, TASKS[cfg.model.name].evaluator.measures)


UNLABELLED = ["data=folder_pair", "data.root=x"]


@pytest.mark.parametrize("figure", FIGURES)
def test_what_is_not_measured_is_known(figure: str):
    pairs = {"cycle_l1", "cycle_psnr", "cycle_ssim"}
    truth = {"psnr", "ssim", "feature_distance"}
    choice = f"metrics.best={figure}"
    data = Data([], [], [], num_classes=10)
    found = missing(config("model=resblock_gan", choice), data) is None
    assert found == (figure not in pairs | truth)
    data = Data([], [], [], num_classes=10, counterparts=True)
    assert (missing(config(choice), data) is None) == (figure != "class_fid")
    data = Data([], [], [])
    of_kinds = truth | {"accuracy", "class_fid"}
    found = missing(config(*UNLABELLED, choice), data) is None
    assert found == (figure not in of_kinds | {"inception_score"})
    found = missing(config(*UNLABELLED, choice, "metrics.extractor=inception"), data) is None
    assert found == (figure not in of_kinds)


def test_patience_with_nothing_to_wait_for_is_refused():
    data = Data([], [], [])
    cfg = config(*UNLABELLED, "metrics.best=accuracy", "metrics.patience=3")
    with pytest.raises(RequestError, match="metrics.patience=3.*metrics.best= coverage, cycle_l1"):
        missing(cfg, data)
    assert missing(config(*UNLABELLED, "metrics.best=cycle_l1", "metrics.patience=3"), data) is (
        None
    )
    said = missing(config(*UNLABELLED, "metrics.best=accuracy"), data)
    assert said is not None and "which has no labels" in said
