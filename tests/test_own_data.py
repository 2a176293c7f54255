"""docs/own_data.md: every command, as it stands there, on small made images."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_data.md"
TRAINER = ["trainer.device=cpu", "trainer.sample_every=1000", "metrics.cache=cache"]
SIZES = ["data.image_size=16", "data.load_size=18", "data.num_workers=0"]
SMALL = {  # what makes the page's own commands small, in front of what they say themselves
    "model=resblock_gan": [
        "model.g_widths=[8,8]", "model.d_widths=[8]", "model.d_downsamplings=1", "model.z_dim=8",
        "data.image_size=8", "data.load_size=9", "data.batch_size=4", "data.num_workers=0",
    ],
    "experiment=": [
        "model.width=4", "model.blocks=1", "model.d_width=4", "model.d_layers=1", *SIZES,
    ],
    "data=folder_pair": ["model.width=4", "model.blocks=1", "model.d_width=4", *SIZES],
}  # fmt: skip
SHRUNK = {  # values of the page's that are large
    "data.image_size=[192,256]": "data.image_size=[12,16]",
    "data.load_size=224": "data.load_size=16",
    "trainer.steps=2000": "trainer.steps=4", "model.width=24": "model.width=6", "256x256": "16x16",
}  # fmt: skip


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def small(words: list[str]) -> list[str]:
    words = [SHRUNK.get(word, word) for word in words]
    if words[1] != "train.py":
        return words
    kind = next(k for k in SMALL if any(word.startswith(k) for word in words))
    own = {word.partition("=")[0] for word in words}
    extra = [word for word in SMALL[kind] if word.partition("=")[0] not in own]
    steps = [] if "trainer.steps" in own else ["trainer.steps=2"]
    return [words[0], str(ROOT / words[1]), *words[2:], *TRAINER, *steps, *extra]


def draw(folder: Path, count: int, size: tuple[int, int], ending: str) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.{ending}")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    for name in ("trainA", "trainB", "testA", "testB"):
        draw(place / "photos" / name, 3, (40, 32), "jpg")
    for name in ("cat", "dog"):
        draw(place / "classes" / name, 4, (20, 24), "png")
    return place


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**own, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=place, env=env, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


def test_every_command(place: Path):
    """In the page's order, for each builds on those before it."""
    seen = set()
    for line in commands():
        words = shlex.split(line)
        if words[0] in ("pip", "tensorboard"):
            continue
        if words[:4] == ["python", "-m", "gannorm", "demo"]:  # its own test opens the page
            assert run(place, *words[:4], "--help").returncode == 0
            continue
        done = run(place, *small(words))
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        seen.add(words[3] if words[1] == "-m" else words[1])
    assert seen == {"train.py", "translate", "sample", "inspect", "export"}
    for made, count in (("translated", 3), ("side_by_side", 3), ("cats", 4), ("both", 20)):
        assert len(list((place / made).glob("*.png"))) == count, made
    assert (place / "runs" / "first" / "checkpoints" / "step_00000004.pt").exists()
    assert {p.name for p in (place / "export").iterdir()} == {"model.safetensors", "README.md"}


def test_every_command_has_help_with_an_example():
    for command in ("sample", "translate", "inspect", "export", "demo"):
        done = run(ROOT, "python", "-m", "gannorm", command, "--help")
        assert done.returncode == 0 and f"python -m gannorm {command}" in done.stdout, done
        assert "example" in done.stdout, command


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python train.py data=folder_pair data.root=nowhere", "data.root=nowhere"),
        ("python train.py data=folder_pair data.root=photos data.preprocess=shrink", "preprocess"),
        ("python train.py data=folder_pair data.root=photos init_from=gone.pth", "gone.pth"),
        ("python -m gannorm translate gone photos out --direction AtoB", "gone"),
        ("python -m gannorm sample gone", "gone"),
        ("python -m gannorm export gone --format onnx --out a.onnx", "gone"),
        ("python -m gannorm demo gone", "gone|demo"),
        ("python -m gannorm inspect gone", "gone"),
    ],
)
def test_bad_requests_end_with_one_line(place: Path, line: str, words: str):
    before = {p for p in place.rglob("*") if "cache" not in p.parts and ".hydra" not in str(p)}
    done = run(place, *small(shlex.split(line)))
    assert done.returncode == 2, done.stderr
    said = [each for each in done.stderr.splitlines() if each and "image/s]" not in each]
    assert len(said) == 1 and re.search(words, said[0]) and "Traceback" not in done.stderr
    after = {p for p in place.rglob("*") if "cache" not in p.parts and ".hydra" not in str(p)}
    assert {p for p in after - before if p.is_file()} == set()
