"""300 images of any kind, whole and damaged, through the check, the loader and translate.

Nothing ends in a traceback, and no file that Pillow reads is lost.
"""

import io
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from generators import config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from gannorm.commands.translation import translate
from gannorm.config import typed
from gannorm.data import build_data
from gannorm.data.images import list_images
from gannorm.errors import RequestError
from gannorm.tasks import build_task
from gannorm.training import checkpoint
from gannorm.training.run import Run

MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I", "F", "I;16"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "webp": ("RGB", "RGBA"),
    "gif": ("1", "L", "P", "RGB"),
    "ppm": ("1", "L", "RGB"),
}
FORMATS = {"jpg": "JPEG", "tif": "TIFF"}
FILES, EXAMPLES = 30, 10
SMALL = ["model.width=2", "model.blocks=1", "model.d_width=2", "data.image_size=16"]


def encoded(ending: str, mode: str, size: tuple[int, int], seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.frombytes("LAB", size, values.tobytes())
    else:
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, FORMATS.get(ending, ending.upper()))
    return out.getvalue()


@st.composite
def files(draw) -> tuple[str, bytes]:
    """An ending and what the file holds: whole, truncated, with bytes flipped, or noise."""
    ending = draw(st.sampled_from(sorted(MODES)))
    side = st.integers(1, 40)
    mode = draw(st.sampled_from(MODES[ending]))
    content = encoded(ending, mode, (draw(side), draw(side)), draw(st.integers(0, 99)))
    damage = draw(st.sampled_from(("none", "truncated", "flipped", "noise", "another ending")))
    if damage == "truncated":
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif damage == "flipped":
        changed = bytearray(content)
        for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            changed[place] ^= draw(st.integers(1, 255))
        content = bytes(changed)
    elif damage == "noise":
        content = draw(st.binary(max_size=200))
    elif damage == "another ending":
        ending = draw(st.sampled_from(sorted(MODES)))
    return ending, content


def readable(path: Path) -> bool:
    """By Pillow alone."""
    try:
        with path.open("rb") as stream:
            return min(Image.open(stream).convert("RGB").size) > 0
    except Exception:  # whatever a damaged file leads to
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    raw = config(*SMALL)
    plain = OmegaConf.to_container(raw, resolve=True)
    run = Run(build_task(typed(raw), torch.device("cpu"), None), plain, step=1)
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder / "checkpoints" / "step_00000001.pt", run.state_dict())
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.lists(files(), min_size=FILES, max_size=FILES))
def test_no_traceback_and_no_lost_file(model, place, drawn):
    warnings.simplefilter("ignore")  # Pillow's about metadata
    shutil.rmtree(place)
    for name in ("trainA", "trainB"):
        (place / "data" / name).mkdir(parents=True)
    for number, (ending, content) in enumerate(drawn):
        (place / "data" / "trainA" / f"{number}.{ending}").write_bytes(content)
    Image.new("RGB", (20, 20), "red").save(place / "data" / "trainA" / "good.png")
    Image.new("RGB", (20, 20), "blue").save(place / "data" / "trainB" / "good.png")
    paths = list_images(place / "data" / "trainA")
    assert len(paths) == FILES + 1
    good = {path for path in paths if readable(path)}

    own = [
        "data=folder_pair", f"data.root={place / 'data'}", "data.num_workers=0", *SMALL,
        f"metrics.cache={place / 'cache'}", "data.on_bad=skip", "data.load_size=17",
    ]  # fmt: skip
    data = build_data(typed(config(*own)).data)
    assert {file.path for file in data.domains[0].files} == good
    assert len(data.skipped) == len(paths) - len(good)
    for source in (data.domains[0], data.real[0]):
        images = source.fetch(list(range(len(source))), torch.Generator())["image"]
        assert images.shape == (len(good), 3, 16, 16) and images.abs().max() <= 1

    endings = [path.with_suffix("").name for path in paths]
    assert len(set(endings)) == len(endings)
    try:
        translate(model, place / "data" / "trainA", place / "out", "AtoB")
        failed = 0
    except RequestError as error:
        failed = int(str(error).split()[0])
    written = {path.stem for path in (place / "out").iterdir()}
    assert written == {path.stem for path in good} and failed == len(paths) - len(good)
