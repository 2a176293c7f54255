"""Training for real, tiny: every norm with every model, resuming bit for bit, SIGKILL."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from gannorm.errors import RequestError
from gannorm.metrics.evaluation import Evaluation
from gannorm.tasks import TASKS
from gannorm.tasks.class_conditional_evaluator import ClassConditionalEvaluator
from gannorm.training import checkpoint
from gannorm.training.dashboard import Dashboard
from gannorm.training.loop import train
from gannorm.training.monitor import Monitor
from gannorm.training.request import run_folder

pytestmark = pytest.mark.usefixtures("quick_runs")
ROOT = Path(__file__).parent.parent
TINY = ["trainer.log_every=1", "trainer.eval_every=1000", "trainer.sample_every=1000"]
MODELS = {
    "cyclegan": [
        "data.image_size=8", "data.batch_size=2", "model.width=4", "model.blocks=1",
        "model.d_width=4", "model.downsamplings=1", "model.d_layers=1",
    ],
    "resblock_gan": [
        "model=resblock_gan", "data.image_size=8", "data.batch_size=4", "model.g_widths=[8,8]",
        "model.d_widths=[8]", "model.d_downsamplings=1", "model.z_dim=4",
    ],
}  # fmt: skip
NORMS = sorted(p.stem for p in (ROOT / "conf" / "norm").glob("*.yaml"))


def config(model: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*MODELS[model], *TINY, *overrides])


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    found = {}
    for line in lines(run_dir):
        if "lr/G" in line:
            found[line["step"]] = {k: v for k, v in line.items() if not k.startswith("speed")}
    return found


def weights(run_dir: Path) -> dict:
    state = checkpoint.load(checkpoint.resolve(run_dir))
    del state["config"], state["seconds"], state["evaluation_seconds"]
    return state


def equal(a, b, where="") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (p, q) in enumerate(zip(a, b, strict=True)):
            equal(p, q, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_or_is_refused(model, norm, tmp_path):
    cfg = config(model, f"norm={norm}", "trainer.steps=6")
    if model == "cyclegan" and norm.startswith("conditional"):
        with pytest.raises(RequestError, match=f"norm={norm}.*choose norm= instance, batch"):
            train(cfg, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    summary = train(cfg, tmp_path)
    assert summary["steps"] == 6 and len(losses(tmp_path)) == 6
    first, last = losses(tmp_path)[1], losses(tmp_path)[6]
    assert first != last
    state = weights(tmp_path)["task"]
    for nets in ("networks", "averaged"):
        assert all(t.isfinite().all() for net in state[nets].values() for t in net.values())


@pytest.fixture(scope="module")
def in_full(quick_runs, tmp_path_factory):
    """The losses of a model's first step in fp32, of one run for both halves."""

    @cache
    def first(model: str) -> dict[str, float]:
        folder = tmp_path_factory.mktemp("fp32")
        train(config(model, "trainer.steps=3", "optim.clip_norm=1"), folder)
        return losses(folder)[1]

    return first


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_mixed_precision(model, precision, in_full, tmp_path):
    cfg = config(model, f"trainer.precision={precision}", "trainer.steps=3", "optim.clip_norm=1")
    train(cfg, tmp_path)
    half, full = losses(tmp_path)[1], in_full(model)
    assert half != full  # it was used
    # Before the first update, which fp16 may skip to find its loss scale.
    keys = ["loss/G_A", "loss/cycle_A"] if model == "cyclegan" else ["loss/D", "loss/D_fake"]
    assert all(abs(half[k] - full[k]) < 0.02 + 0.02 * abs(full[k]) for k in keys)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "model,extra",
    [
        ("cyclegan", ["model.dropout=true", "model.pool_size=3", "trainer.precision=fp16"]),
        ("resblock_gan", ["optim.d_steps=2", "trainer.precision=bf16", "model.block=postact"]),
        ("resblock_gan", ["loss=rpgan", "loss.diffaugment=[color,translation,cutout]"]),
        ("cyclegan", ["loss=wgan_gp", "optim.d_steps=2", "loss.diffaugment=[cutout]"]),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(model, extra, tmp_path):
    """Weights, averages, optimizers, pools, scaler and generators, to the last bit."""
    steps = ["trainer.steps=8", "trainer.checkpoint_every=3", "trainer.eval_every=4", *extra]
    train(config(model, *steps), tmp_path / "whole")
    part = tmp_path / "part"
    # Two resumes, with other calls on the generators in between, as another process would have.
    for stop in (3, 6):
        shortened = config(model, *steps, "resume=auto")
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "prune", lambda *_, stop=stop: stop_at(part, stop))
            train(shortened, part)
        torch.rand(7), random.random()
    train(config(model, *steps, "resume=auto"), part)
    equal(weights(tmp_path / "whole"), weights(part))
    assert losses(tmp_path / "whole") == losses(part)


@pytest.fixture(scope="module")
def two_steps(quick_runs, tmp_path_factory) -> Path:
    """A finished run, to be read or copied."""
    folder = tmp_path_factory.mktemp("two_steps")
    train(config("resblock_gan", "trainer.steps=2"), folder)
    return folder


def stop_at(run_dir: Path, step: int) -> None:
    if checkpoint.newest(run_dir) == run_dir / "checkpoints" / f"step_{step:08d}.pt":
        raise KeyboardInterrupt


class Never:
    """An evaluator that looks at nothing."""

    measures, named, captions = ("features",), False, None

    def __init__(self, task, data):
        self.task, self.device, self.data = task, task.device, data

    def reference_figures(self):
        return {}

    protocol = samples = reference_figures

    def diagnose(self):
        return {}, {}

    def evaluate(self, generators, brief=False):
        return Evaluation({"fid": 1.0})

    def share_state(self):
        pass


@pytest.mark.parametrize(
    "model,extra",
    [("resblock_gan", ["model.g_spectral_norm=true"]), ("cyclegan", ["norm=batch"])],
)
def test_evaluation_leaves_training_alone(model, extra, tmp_path, monkeypatch):
    """The weights, to the bit, of a run that is never evaluated, nor shows a sample."""
    extra = ["trainer.steps=4", "model.dropout=true" if model == "cyclegan" else extra[0], *extra]
    often = ["trainer.eval_every=1", "trainer.sample_every=1", "trainer.checkpoint_every=1"]
    standing = ["metrics.standing_batches=2", "metrics.samples=20"]
    train(config(model, *extra, *TINY[:1], *often, *standing), tmp_path / "often")
    evaluated = weights(tmp_path / "often")

    monkeypatch.setitem(TASKS, model, replace(TASKS[model], evaluator=Never))
    monkeypatch.setattr(Dashboard, "show", lambda self, step, evaluation: None)
    monkeypatch.setattr(Monitor, "images", lambda self, step, samples: None)
    train(config(model, *extra), tmp_path / "never")
    never = weights(tmp_path / "never")
    del evaluated["watch"], never["watch"]  # what evaluations have seen
    assert evaluated.pop("best")["value"] != never.pop("best")["value"]
    equal(evaluated, never)


def test_raw_and_averaged_generators_stand_side_by_side(two_steps, tmp_path):
    last = next(line for line in reversed(lines(two_steps)) if "quality/fid" in line)
    raw = {k.removeprefix("quality_raw/") for k in last if k.startswith("quality_raw/")}
    assert raw == {k.removeprefix("quality/") for k in last if k.startswith("quality/")}
    assert last["quality/fid"] != last["quality_raw/fid"]
    assert {f"class_fid/{k}" for k in range(10)} <= set(last)
    summary = json.loads((two_steps / "summary.json").read_text())
    assert last["protocol"] == summary["protocol"] and last["protocol"]["generated"] == 60
    floor = lines(two_steps)[0]
    assert floor["protocol"] == summary["protocol"] and floor["reference/coverage_real"] > 0
    # Without an average there is one generator.
    train(config("resblock_gan", "trainer.steps=1", "optim.ema_decay=0.0"), tmp_path)
    assert "quality/fid" in lines(tmp_path)[-1]
    assert not any(k.startswith("quality_raw/") for line in lines(tmp_path) for k in line)


def test_standing_statistics_change_what_is_measured(two_steps, tmp_path):
    with_ = train(config("resblock_gan", "trainer.steps=2", "metrics.standing_batches=4"), tmp_path)
    without = json.loads((two_steps / "summary.json").read_text())
    assert with_["quality"]["fid"] != without["quality"]["fid"]
    assert (with_["protocol"]["standing_batches"], without["protocol"]["standing_batches"]) == (
        4,
        0,
    )
    equal(weights(two_steps)["task"], weights(tmp_path)["task"])


def scripted(monkeypatch, values: list[float]) -> None:
    """Evaluations that find these FIDs, one after the other."""
    found = iter(values)
    monkeypatch.setattr(
        ClassConditionalEvaluator, "evaluate",
        lambda self, generators, brief=False: Evaluation({"fid": 0.0 if brief else next(found)}),
    )  # fmt: skip


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, 1.0, 2.0, 4.0])
    often = ["trainer.steps=4", "trainer.keep_checkpoints=1", "trainer.checkpoint_every=1"]
    summary = train(config("resblock_gan", *TINY[:1], "trainer.eval_every=1", *often), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000004.pt"]
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert best["step"] == 2 and best["best"] == {"value": 1.0, "step": 2, "since": 0}
    assert summary["best"] == {"figure": "fid", "value": 1.0, "step": 2}
    assert checkpoint.resolve(tmp_path).name == "step_00000004.pt"

    # Another folder begins with a best of its own; the same one keeps it.
    scripted(monkeypatch, [9.0])
    more = ["trainer.steps=5", "trainer.eval_every=5"]
    other = config("resblock_gan", *TINY[:1], *more, f"resume={checkpoint.resolve(tmp_path)}")
    assert train(other, tmp_path / "other")["best"]["value"] == 9.0
    scripted(monkeypatch, [9.0])
    # Neither does a patience decide what is measured.
    same = config("resblock_gan", *TINY[:1], *more, "resume=auto", "metrics.patience=9")
    assert train(same, tmp_path)["best"]["step"] == 2
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["step"] == 2


def test_another_figure_begins_with_a_best_of_its_own(tmp_path):
    """An FID of hundreds is no coverage that could never be reached."""
    small = [*TINY[:1], "trainer.eval_every=1"]
    train(config("resblock_gan", *small, "trainer.steps=1"), tmp_path)
    later = ["trainer.steps=2", "resume=auto", "metrics.best=coverage"]
    best = train(config("resblock_gan", *small, *later), tmp_path)["best"]
    assert best["step"] == 2 and best["value"] <= 1
    few = config("resblock_gan", *small, "metrics.samples=4", "metrics.patience=1")
    with pytest.raises(RequestError, match=r"4 images .* must be more than 5"):
        train(few, tmp_path / "few")


def test_a_plateau_ends_the_run(tmp_path, monkeypatch):
    values = [5.0, 6.0, 4.0, 4.5, 4.0, 1.0]
    often = [*TINY[:1], "trainer.eval_every=2", "trainer.steps=20", "metrics.patience=2"]
    scripted(monkeypatch, values)
    summary = train(config("resblock_gan", *often), tmp_path)
    assert summary["steps"] == 10 and summary["best"]["step"] == 6
    assert checkpoint.resolve(tmp_path).name == "step_00000010.pt"
    assert (tmp_path / "samples" / "step_00000010.png").exists()
    scripted(monkeypatch, values)  # it has ended: nothing is trained
    again = train(config("resblock_gan", *often, "resume=auto"), tmp_path)
    assert again["steps"] == 10 and sorted(losses(tmp_path)) == list(range(1, 11))


def test_a_figure_that_is_not_measured(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("trainA", "trainB", "testA"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    own = [
        "data=folder_pair", f"data.root={tmp_path}", "data.image_size=16", "data.load_size=18",
        "data.num_workers=0", "trainer.steps=1",
    ]  # fmt: skip
    summary = train(config("cyclegan", *own), tmp_path / "run")
    said = capsys.readouterr().out
    assert "metrics.best=fid is not measured" in said and "1 images (held out" in said
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()
    assert set(summary["quality"]) == {
        f"cycle_{name}_{domain}" for name in ("l1", "psnr", "ssim") for domain in "AB"
    }
    with pytest.raises(RequestError, match="metrics.patience=1.*choose another metrics.best="):
        train(config("cyclegan", *own, "metrics.patience=1"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_checkpoints_kept(tmp_path):
    keep = ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=2", "trainer.steps=4"]
    train(config("resblock_gan", *keep), tmp_path)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best.pt", "step_00000003.pt", "step_00000004.pt"]


def test_resume_is_refused_under_another_configuration(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "a")
    before = sorted(p for p in (tmp_path / "a").rglob("*"))
    changed = config("resblock_gan", "optim.beta1=0.25", "seed=3", f"resume={tmp_path / 'a'}")
    with pytest.raises(RequestError, match=r"optim.beta1=0.25 \(the run: 0.0\), seed=3"):
        train(changed, tmp_path / "b")
    with pytest.raises(RequestError, match="already holds a run"):
        train(config("resblock_gan"), tmp_path / "a")
    first = tmp_path / "a" / "checkpoints" / "step_00000001.pt"
    shutil.copy(checkpoint.resolve(tmp_path / "a"), first)
    before.append(first)
    with pytest.raises(RequestError, match="has a checkpoint step_00000002.pt of its own"):
        train(config("resblock_gan", f"resume={first}"), tmp_path / "a")
    with pytest.raises(RequestError, match="no checkpoint or run folder"):
        train(config("resblock_gan", "resume=nowhere.pt"), tmp_path / "b")
    assert sorted(p for p in (tmp_path / "a").rglob("*")) == sorted(before)
    assert not (tmp_path / "b").exists()


def test_a_resumed_run_may_have_another_precision(tmp_path):
    for steps, precision in enumerate(("fp32", "fp16", "bf16", "fp32"), 1):
        changes = [f"trainer.steps={steps}", f"trainer.precision={precision}", "resume=auto"]
        assert train(config("resblock_gan", *TINY[:1], *changes), tmp_path)["steps"] == steps


def test_a_longer_run_goes_on_from_a_finished_one(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    summary = train(config("resblock_gan", "trainer.steps=4", "resume=auto"), tmp_path)
    assert summary["steps"] == 4 and sorted(losses(tmp_path)) == [1, 2, 3, 4]
    again = train(config("resblock_gan", "trainer.steps=4", "resume=auto"), tmp_path)
    assert again["quality"] == summary["quality"]


def test_run_folder(tmp_path):
    family = str(tmp_path / "family")
    assert run_folder(family, "now", None) == f"{family}/now"
    assert run_folder(family, "now", "auto") == f"{family}/now"
    for name, finished in (("1", True), ("2", False), ("3", False), ("4", True)):
        (tmp_path / "family" / name / "checkpoints").mkdir(parents=True)
        if name != "3":
            (tmp_path / "family" / name / "checkpoints" / "step_00000001.pt").touch()
        if finished:
            (tmp_path / "family" / name / "summary.json").touch()
    assert run_folder(family, "now", "auto") == f"{family}/4"  # finished, and to be continued
    assert run_folder(family, "now", f"{family}/1") == f"{family}/1"
    file = f"{family}/1/checkpoints/step_00000001.pt"
    assert run_folder(family, "now", file) == f"{family}/now"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss/.*optim.lr_g"):
        train(config("resblock_gan", "optim.lr_g=1e30", "trainer.steps=20"), tmp_path)


def test_learning_rates_decay_to_zero(tmp_path):
    train(config("resblock_gan", "trainer.steps=4", "optim.decay_from=0.5"), tmp_path)
    rates = [losses(tmp_path)[step]["lr/G"] for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


def test_averages_start_as_copies_and_then_lag(tmp_path):
    train(config("resblock_gan", "trainer.steps=2", "optim.ema_start=2"), tmp_path / "copy")
    state = weights(tmp_path / "copy")["task"]
    equal(state["networks"]["G"], state["averaged"]["G"])
    train(config("resblock_gan", "trainer.steps=2", "optim.ema_decay=0.5"), tmp_path / "lag")
    state = weights(tmp_path / "lag")["task"]
    current, average = state["networks"]["G"], state["averaged"]["G"]
    assert not torch.equal(current["linear.weight"], average["linear.weight"])
    # The norms' running statistics are averaged too.
    name = "blocks.0.norm1.running_mean"
    assert 0 < average[name].norm() and not torch.equal(current[name], average[name])


@pytest.mark.slow
def test_sigkill_three_times(tmp_path):
    """A real process, killed at random moments, started again with resume=auto each time."""
    sizes = ["model.width=4", "model.blocks=1", "model.d_width=4", "data.batch_size=2"]
    command = [sys.executable, "train.py", *sizes, "trainer.steps=240"]
    command += [
        "trainer.checkpoint_every=20",
        "trainer.eval_every=100",
        "resume=auto",
        "trainer.log_every=1",
    ]
    whole, part = tmp_path / "whole", tmp_path / "part"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, f"hydra.run.dir={folder}"], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    assert start(whole).wait() == 0
    pick = random.Random(0)
    for k in range(3):
        process = start(part)
        target = k * 60 + pick.randrange(25, 75)
        while process.poll() is None and step_of(part) < target:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(part).wait() == 0
    equal(weights(whole), weights(part))
    assert losses(whole) == losses(part)


def step_of(run_dir: Path) -> int:
    """The step a run has logged last; 0 before the first."""
    try:
        return lines(run_dir)[-1]["step"]
    except (OSError, IndexError, ValueError):
        return 0
