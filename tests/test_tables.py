"""Parts of one's own: registered from outside, chosen on the command line, trained, measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import forked

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.image_size=8", "model.g_widths=[8,8]", "model.d_widths=[8]", "model.d_downsamplings=1",
    "trainer.steps=2",
    "trainer.log_every=1", "metrics.samples=20",
]  # fmt: skip
OWN = ["norm=halves", "data=stripes", "metrics.best=mean_distance"]


def test_a_norm_a_data_set_and_a_figure_from_outside_train(tmp_path):
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "examples/own_parts.py", "model=resblock_gan", *OWN, *SMALL]
    command += [f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "norm halves, data stripes (400 images)" in done.stdout
    assert "mean_distance: " in done.stdout and "(real " in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["best"]["figure"] == "mean_distance"
    assert summary["best"]["value"] == summary["quality"]["mean_distance"] > 0
    assert (tmp_path / "checkpoints" / "best.pt").exists()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert any("quality/mean_distance" in line for line in lines)


@pytest.mark.parametrize("choice", OWN)
def test_without_the_registration_they_are_unknown(choice, tmp_path):
    done = forked("model=resblock_gan", choice, said=tmp_path)
    name = choice.partition("=")[2]
    assert done.returncode == 2 and name in done.stderr and "unknown" in done.stderr
    assert "Traceback" not in done.stderr
