"""A small multirun of the study, and the report that is made of its runs and of made-up ones."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from test_train import CYCLEGAN, RESBLOCK, ROOT, forked

from gannorm.errors import RequestError
from gannorm.study.__main__ import main
from gannorm.study.members import members, register
from gannorm.study.plots import Sheet
from gannorm.study.report import COMMANDS, QUESTIONS, answer, choice, table
from gannorm.study.runs import Spread, apart, read
from gannorm.training.loop import train
from gannorm.training.monitor import Monitor

SIZES = [each for each in CYCLEGAN if "batch_size" not in each and "steps" not in each]
LENGTH = ["trainer.steps=4", "trainer.eval_every=2", "metrics.samples=20"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real run of a CycleGAN's member by the command, one of a ResBlock GAN's."""
    folder = tmp_path_factory.mktemp("study")
    glob = "study=glob(cyclegan-*-16,exclude=[*batch*,*group*,*layer*,*none*])"
    done = forked("-m", "seed=0,1", glob, *SIZES, *LENGTH, "data.batch_size=2",
                  f"hydra.sweep.dir={folder}", said=folder / "said")  # fmt: skip
    assert done.returncode == 0, done.stderr
    register()
    name = "resblock_gan-batch-16"
    small = [each for each in RESBLOCK if not each.startswith(("model=", "trainer"))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"study={name}", *small, *LENGTH])
    where = folder / "norm_study" / name / "seed_0"
    train(cfg, where)
    (where / ".hydra").mkdir()
    OmegaConf.save(cfg, where / ".hydra" / "config.yaml")
    return folder / "norm_study"


@pytest.fixture
def whole(trained: Path, tmp_path: Path) -> Path:
    """All runs of the study, made up from the real ones; instance norm and correct starts win."""
    ahead = ("cyclegan-instance-1", "resblock_gan-conditional_batch-16")
    for name, member in members().items():
        kind = "cyclegan-instance-16" if member.model == "cyclegan" else "resblock_gan-batch-16"
        for seed in (0, 1, 2):
            folder = tmp_path / "whole" / name / f"seed_{seed}"
            ignored = shutil.ignore_patterns("checkpoints", "events*")
            shutil.copytree(trained / kind / "seed_0", folder, ignore=ignored)
            config = OmegaConf.load(folder / ".hydra" / "config.yaml")
            config.data.batch_size, config.seed = member.batch_size, seed
            OmegaConf.save(config, folder / ".hydra" / "config.yaml")
            better = 0.9 if name in ahead else 0.5
            rewrite(folder, "accuracy", better + 0.01 * seed)
            rewrite(folder, "fid", 10.0 / better + seed)
            rewrite(folder, "coverage", 0.5)
    return tmp_path / "whole"


def rewrite(folder: Path, figure: str, value: float) -> None:
    """The figure of every evaluation of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line in lines:
        for key in line:
            if key.startswith(("quality/", "quality_raw/")) and figure in key.partition("/")[2]:
                line[key] = value
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.mark.slow
def test_the_report_of_a_real_multirun(trained: Path, tmp_path: Path, capsys):
    out = tmp_path / "study.md"
    main([str(trained), "--out", str(out)])
    text, said = out.read_text(), capsys.readouterr().out
    assert "Runs: 3 of 57." in text and said.splitlines()[-1] == str(out)
    assert "| instance | 2 | 2 |" in text and "| batch | 2 | 1 |" in text
    assert "4 steps, 8 images a domain, 2 evaluations" in text
    for name in ("`cyclegan-batch-1`, seed 0: not started", "`resblock_gan-batch-16`, seed 1"):
        assert name in text and f"absent: {name}" in said
    assert "Not known: fewer than two seeds of `cyclegan-instance-1` and `cyclegan-batch-1`" in text
    pictures = {path.name for path in (tmp_path / "study").iterdir()}
    assert pictures == {
        "cyclegan_curves.png", "cyclegan_AtoB.png", "cyclegan_BtoA.png",
        "resblock_gan_curves.png", "resblock_gan_samples.png",
    }  # fmt: skip
    for name in pictures:
        assert f"(study/{name})" in text
        with Image.open(tmp_path / "study" / name) as image:
            assert np.asarray(image.convert("RGB")).std() > 10


def test_the_report_of_all_runs(whole: Path, tmp_path: Path):
    out = tmp_path / "study.md"
    main([str(whole), "--out", str(out)])
    text = out.read_text()
    assert "Runs: 57 of 57." in text and "Absent" not in text
    assert "| 91.0% ± 1.0% | 51.0% ± 1.0% | +40.0 points | yes |" in text
    assert "**91.0% ± 1.0%**" in text
    for path in (tmp_path / "study").iterdir():
        assert path.stat().st_size < 150_000
    runs, absent = read(whole)
    assert not absent
    verdicts = [answer(question, runs) for question in QUESTIONS]
    assert "**Yes**: instance is ahead of batch in accuracy B to A" in verdicts[0]
    assert "not told apart in coverage B to A" in verdicts[0]
    assert "**The seeds do not tell them apart**" in verdicts[1]
    assert "**Yes**: instance is ahead of none in accuracy B to A" in verdicts[2]
    assert "**The seeds do not tell them apart**" in verdicts[3]
    assert "**Yes**: conditional_batch is ahead of batch in accuracy, FID" in verdicts[4]
    assert "**Yes**: conditional_batch is ahead of none in accuracy, FID" in verdicts[5]
    assert "**The seeds do not tell them apart**" in verdicts[6]
    assert choice("resblock_gan", 16, runs).startswith(
        "- Class-conditional ResBlock GAN, batch size 16: **choose `conditional_batch` (12.11)**. "
        "The rest: `instance` (21.00) behind `conditional_batch`, "
    )
    for text in verdicts[7:]:
        assert "At the first evaluation, step 2: **It costs**" in text and "At the end: **" in text
    assert len(table("resblock_gan", runs).splitlines()) == 2 + 9 + 1


def test_a_verdict_follows_the_figures(whole: Path):
    first, second = QUESTIONS[0].first, QUESTIONS[0].second
    for seed in (0, 1, 2):
        rewrite(whole / second / f"seed_{seed}", "fid", 5.0)
    runs = read(whole)[0]
    assert "**Mixed**: instance is ahead in accuracy" in answer(QUESTIONS[0], runs)
    mixed = "**choose `batch` (5.00)**. No norm is ahead of `instance` (12.11) either. The rest: "
    assert mixed in choice("cyclegan", 1, runs)
    for seed in (0, 1, 2):
        rewrite(whole / first / f"seed_{seed}", "accuracy", 0.1)
    found = answer(QUESTIONS[0], read(whole)[0])
    assert "**No, the reverse**: batch is ahead of instance in accuracy B to A" in found
    assert "| 10.0% ± 0.0% | 51.0% ± 1.0% | -41.0 points | yes |" in found
    for seed in (0, 1, 2):
        rewrite(whole / second / f"seed_{seed}", "fid_AtoB", 40.0)
    assert "**choose `instance` (12.11)**" in choice("cyclegan", 1, read(whole)[0])


def test_absent_runs_say_why(whole: Path):
    stopped, unfinished = (whole / "cyclegan-none-1" / f"seed_{seed}" for seed in (0, 1))
    for folder in (stopped, unfinished):
        (folder / "summary.json").unlink()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 300, "health/not_finite": 1.0}) + "\n")
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "quality/f')
    assert read(whole)[1] == [
        "`cyclegan-none-1`, seed 0: became NaN before step 300",
        "`cyclegan-none-1`, seed 1: unfinished, at step 4",
    ]


def test_runs_that_cannot_be_compared_are_refused(whole: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="no finished run of the study"):
        read(tmp_path / "nothing")
    path = whole / "cyclegan-layer-16" / "seed_1" / ".hydra" / "config.yaml"
    kept = path.read_text()
    path.write_text(kept.replace("lr_g: 0.0006", "lr_g: 0.1"))
    with pytest.raises(RequestError, match=r"optim.lr_g is 0.0006 and 0.1; train them alike"):
        read(whole)
    path.write_text(kept.replace("eval_every: ", "eval_every: 1"))
    with pytest.raises(RequestError, match=r"trainer.eval_every is (\d+) and 1\1"):
        read(whole)
    path.write_text(kept)
    summary = path.parents[1] / "summary.json"
    summary.write_text(summary.read_text().replace('"steps": 4', '"steps": 5'))
    with pytest.raises(RequestError, match="steps is 4 and 5"):
        read(whole)


def test_tiles_are_where_the_monitor_draws_them(trained: Path, tmp_path: Path):
    """Every tile of a picture in its own grey."""
    found = read(trained)[0]["cyclegan-instance-16"][0]
    greys = torch.linspace(-1, 1, 48).view(2, 24, 1, 1, 1).expand(2, 24, 3, 8, 8)
    monitor = Monitor(tmp_path, 0)
    monitor.images(0, {"A_to_B_to_A": (greys[0], 3), "B_to_A_to_B": (greys[1], 3)})
    monitor.close()
    found.folder = tmp_path
    sheet = Sheet(found, 3)
    assert sheet.rows == 8
    for grid, row, column in ((0, 0, 0), (0, 7, 2), (1, 0, 0), (1, 3, 1)):
        tile = np.asarray(sheet(row, column, grid))
        assert (
            tile.min()
            == tile.max()
            == pytest.approx(255 * (48 * 0 + 24 * grid + 3 * row + column) / 47, abs=1)
        )
    with pytest.raises(ValueError, match="another layout"):
        Sheet(found, 4)


def test_tiles_beside_the_names_of_classes(trained: Path, tmp_path: Path):
    found = read(trained)[0]["cyclegan-instance-16"][0]
    monitor = Monitor(tmp_path, 0)
    monitor.captions = lambda name: (["cat", "a very long name"], ())
    greys = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    monitor.images(0, {"class_by_noise": (greys, 3)})
    monitor.close()
    found.folder, found.config["data"] = tmp_path, {**found.config["data"], "name": "image_folder"}
    sheet = Sheet(found, 3)
    assert sheet.rows == 2 and sheet.left > 50
    for row, column in ((0, 0), (1, 2)):
        tile = np.asarray(sheet(row, column))
        assert tile.min() == tile.max() == pytest.approx(255 * (3 * row + column) / 5, abs=1)


def test_many_seeds_are_told_apart_by_a_test():
    few, many = (Spread(tuple(map(float, range(n)))) for n in (3, 8))
    shifted = Spread(tuple(x + 5.5 for x in many.values))
    assert not apart(few, Spread((2.0, 9.0))) and apart(few, Spread((2.5, 9.0)))
    assert many.overlaps(shifted) and apart(many, shifted)
    assert not apart(many, Spread(tuple(x + 0.5 for x in many.values)))


def test_the_commands_choose_what_they_should():
    parser = OverridesParser.create()
    chosen = []
    for line in COMMANDS.splitlines()[:2]:
        words = shlex.split(line)[3:]
        seeds, study = (parser.parse_override(word) for word in words)
        names = [study.value().filter(list(members()))]
        chosen += [(seed, name) for seed in seeds.sweep_iterator() for name in names[0]]
    assert len(chosen) == 57 + 15 and len(set(chosen)) == len(chosen)


def test_the_commands_are_those_of_the_docs():
    paths = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(path.read_text() for path in paths if path.stem != "norm_study")
    first, *_, last = COMMANDS.splitlines()
    assert first.removeprefix("python train.py ") in text and last in text
