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


def test_torchvision_resnet():
    said = run("torchvision_resnet")
    assert said.startswith("20 batch norms are ours\n")
    (worst,) = re.findall(r"^largest difference: (\S+)$", said, re.MULTILINE)
    assert 0 < float(worst) < 1e-4


@pytest.mark.parametrize("own", [False, True])
def test_own_folder(own: bool, tmp_path: Path):
    images, out = tmp_path / "images", tmp_path / "run"
    if own:
        for kind in "AB":
            (images / f"train{kind}").mkdir(parents=True)
            Image.new("RGB", (20, 30), "red").save(images / f"train{kind}" / "one.jpg")
    said = run("own_folder", *([images] if own else []), "--steps", "2", "--size", "16",
               "--out", out)  # fmt: skip
    assert f"samples while training: {out}/samples" in said and list(out.glob("samples/*.png"))
    translated = sorted((out / "translated").iterdir())
    sizes = [Image.open(path).size for path in translated]
    assert sizes == ([(20, 30)] if own else [(40, 40)] * 6)
