"""The default runs' figures over seeds, from two small real runs."""

import shutil
from pathlib import Path

import pytest
from digit_data import digit_data
from hydra import compose, initialize_config_dir
from PIL import Image
from test_train import CYCLEGAN, RESBLOCK, ROOT

from benchmarks.defaults import main, read_right, reader, table
from gannorm.data import fetch_all
from gannorm.errors import RequestError
from gannorm.metrics import features
from gannorm.training.loop import train


@pytest.fixture(scope="module", autouse=True)
def quick_classifiers():
    """The runs' own, which are not at issue."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defaults")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name, small in (("translation", CYCLEGAN), ("classes", RESBLOCK)):
            train(compose("config", small), folder / name / "run")
    return folder


def test_the_outsider_reads_real_digits_and_no_others():
    data = digit_data(size=8)
    test = fetch_all(data.test[0])
    svm = reader(data.real[0])
    assert read_right(svm, test["image"], test["label"]) > 0.97
    assert read_right(svm, test["image"], test["label"].roll(1)) < 0.3
    assert read_right(svm, -test["image"], test["label"]) < 0.5


def test_a_row_for_each_model_and_direction(trained: Path, capsys: pytest.CaptureFixture[str]):
    main([str(trained)])
    rows = capsys.readouterr().out.splitlines()
    names = [row.split("|")[1].strip() for row in rows[2:]]
    assert names == [
        "classes, 1 runs",
        "translation, A to B, 1 runs",
        "translation, B to A, 1 runs",
    ]
    assert all("real 9" in row.split("|")[3] for row in rows[2:])  # the outsider of real images


def test_mean_and_range_over_runs():
    def run(accuracy: float) -> dict[str, dict[str, float]]:
        row = {"accuracy": accuracy, "outsider": accuracy, "fid": 10 * accuracy, "coverage": 0.5}
        return {"": row | {f"{key}_real": 1.0 for key in row}}

    row = table({"gan": [run(0.9), run(0.7), run(0.8)]}).splitlines()[-1]
    assert "| gan, 3 runs | 80.0% (70.0% to 90.0%), real 100.0% |" in row
    assert "8.0 (7.0 to 9.0), real 1.0" in row


def test_runs_that_are_no_seeds_of_one(trained: Path, tmp_path: Path, capsys):
    """Another configuration is refused, unlabelled images are left out."""
    shutil.copytree(trained / "classes", tmp_path / "classes")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        train(compose("config", [*RESBLOCK, "optim.lr_g=2e-3", "seed=1"]), tmp_path / "classes/b")
        for name in ("trainA", "trainB"):
            folder = tmp_path / "pair" / name
            folder.mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (40, 40), (k * 90, 9, 9)).save(folder / f"{k}.png")
        pair = [*CYCLEGAN, "data=folder_pair", f"data.root={tmp_path / 'pair'}"]
        train(compose("config", pair), tmp_path / "unlabelled" / "run")
    with pytest.raises(RequestError, match="optim.lr_g is 0.002 and 0.001"):
        main([str(tmp_path / "classes")])
    with pytest.raises(RequestError, match="no finished run"):
        main([str(tmp_path / "unlabelled")])
    assert "without labels, left out" in capsys.readouterr().err


def test_no_runs(tmp_path: Path):
    with pytest.raises(RequestError, match="no finished run"):
        main([str(tmp_path)])
