"""The examples, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: str | Path) -> str:
    """What it prints, on a machine without a GPU, from the source tree alone."""
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**own, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"examples/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchvision_resnet():
    said = run("torchvision_resnet")
    assert said.startswith("20 batch norms are ours\n")
    (worst,) = re.findall(r"^largest difference: (\S+)$", said, re.MULTILINE)
    assert 0 < float(worst) < 1e-4


@pytest.mark.slow
def test_own_folder(tmp_path: Path):
    """The folders that it draws; one's own are the same by another name."""
    out = tmp_path / "run"
    said = run("own_folder", "--steps", "2", "--size", "16", "--out", out)
    assert f"samples while training: {out}/samples" in said and list(out.glob("samples/*.png"))
    sizes = [Image.open(path).size for path in sorted((out / "translated").iterdir())]
    assert sizes == [(40, 40)] * 6
