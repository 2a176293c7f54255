"""Runs that go on: more steps, other rates, learning rates that never rise unasked."""

import re
from pathlib import Path

import pytest
from test_loop import config, losses, weights

from gannorm.tasks.task import scheduled
from gannorm.training import checkpoint
from gannorm.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linear", [1, 1, 1, 0.5]), ("cosine", [1, 1, 1, 0.5]), ("constant", [1, 1, 1, 1])],
)
def test_schedules(kind, expected):
    assert [scheduled(kind, 0.5, step, 4) for step in range(4)] == pytest.approx(expected)
    eighths = [scheduled(kind, 0.0, step, 8) for step in range(9)]
    assert all(a >= b for a, b in zip(eighths, eighths[1:], strict=False))
    assert eighths[0] == 1.0 and eighths[8] == (1.0 if kind == "constant" else 0.0)
    assert kind != "cosine" or eighths[2] == pytest.approx(0.5 + 0.5 * 2**-0.5)


def extended(folder: Path, *overrides: str) -> list[float]:
    """The rates of a run of 4 steps and, with these overrides, of its continuation to 8."""
    first = ["trainer.steps=4", "optim.decay_from=0.5", "trainer.log_every=1"]
    train(config("resblock_gan", *first), folder)
    train(config("resblock_gan", *first, "trainer.steps=8", "resume=auto", *overrides), folder)
    found = losses(folder)
    assert list(found) == list(range(1, 9)) and weights(folder)["step"] == 8
    return [found[step]["lr/G"] for step in found]


def test_more_steps_never_raise_the_rates(tmp_path, capsys):
    assert extended(tmp_path) == pytest.approx([1e-3] * 3 + [5e-4] * 4 + [2.5e-4])
    said = capsys.readouterr().out
    assert "changed: trainer.steps: 4 -> 8" in said and "optim.restart=true" not in said


def test_a_schedule_begins_anew_when_asked(tmp_path, capsys):
    assert extended(tmp_path, "optim.restart=true") == pytest.approx(
        [1e-3] * 3 + [5e-4] + [1e-3] * 3 + [5e-4]
    )
    assert "begins anew at step 4" in capsys.readouterr().out
    again = ["trainer.steps=8", "optim.decay_from=0.5", "optim.restart=true", "resume=auto"]
    assert weights(tmp_path)["task"]["schedule"] == {"start": 4, "cap": 1.0, "halvings": 0}
    train(config("resblock_gan", *again), tmp_path)  # killed and started again: not once more
    assert weights(tmp_path)["task"]["schedule"]["start"] == 4


def test_another_schedule_may_begin_anew_too(tmp_path, capsys):
    first = ["trainer.steps=8", "optim.decay_from=0.5", "trainer.log_every=1"]
    stopped = ["trainer.steps=4", "optim.decay_from=0.0", "trainer.log_every=1"]
    train(config("resblock_gan", *stopped), tmp_path)
    assert losses(tmp_path)[4]["lr/G"] == pytest.approx(2.5e-4)
    train(config("resblock_gan", *first, "resume=auto", "optim.restart=true"), tmp_path)
    assert losses(tmp_path)[5]["lr/G"] == pytest.approx(1e-3)
    constant = ["trainer.steps=8", "optim.schedule=constant", "optim.decay_from=0.5"]
    train(config("resblock_gan", *constant, "resume=auto", "optim.restart=true"), tmp_path)
    assert capsys.readouterr().out.count("begins anew") == 2


def test_rates_and_weights_may_be_corrected(tmp_path, capsys):
    changes = ["optim.lr_g=1e-4", "loss.r1=0.5", "optim.schedule=constant", "trainer.log_every=2"]
    first = ["trainer.steps=4", "trainer.log_every=1"]
    train(config("resblock_gan", *first), tmp_path)
    train(config("resblock_gan", "trainer.steps=6", "resume=auto", *changes), tmp_path)
    said = capsys.readouterr().out
    for line in ("optim.lr_g: 0.001 -> 0.0001", r"loss.r1: [\d.]+ -> 0.5",
                 "optim.schedule: linear -> constant"):  # fmt: skip
        assert re.search(f"changed: {line}", said)
    saved = checkpoint.load(checkpoint.newest(tmp_path))["config"]
    assert (saved["optim"]["lr_g"], saved["loss"]["r1"]) == (1e-4, 0.5)
    assert losses(tmp_path)[6]["lr/G"] <= 1e-4 and "loss/D_penalty" in losses(tmp_path)[6]


def test_a_finished_run_says_so(tmp_path, capsys):
    for _ in range(2):
        train(config("resblock_gan", "trainer.steps=2", "resume=auto"), tmp_path)
    assert "all 2 steps are taken; trainer.steps= of more continues" in capsys.readouterr().out
    assert list(losses(tmp_path)) == [1, 2] and weights(tmp_path)["step"] == 2
