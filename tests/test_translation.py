"""`python -m gannorm translate`: sizes, tiles, videos and its other options."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from generators import config, generator
from omegaconf import OmegaConf
from PIL import Image

from gannorm.__main__ import parser
from gannorm.commands.pictures import parse_size
from gannorm.commands.tiling import Tiler
from gannorm.commands.translation import Translator, _Job
from gannorm.config import typed
from gannorm.errors import answering_requests
from gannorm.tasks import build_task
from gannorm.training import checkpoint
from gannorm.training.run import Run

ROOT = Path(__file__).parents[1]
SMALL = ["model.width=4", "model.blocks=1", "model.d_width=4", "data.image_size=24"]
KINDS = {"colour": [], "grey": ["data.channels=1", "norm=batch", "model.dropout=true"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by kind, each with a checkpoint of a model that was not trained."""
    root = tmp_path_factory.mktemp("runs")
    for kind, overrides in KINDS.items():
        raw = config(*SMALL, *overrides)
        torch.manual_seed(0)
        task = build_task(typed(raw), CPU, None)
        for net in task.averaged.values():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        run = Run(task, OmegaConf.to_container(raw, resolve=True), step=1)
        (root / kind / "checkpoints").mkdir(parents=True)
        checkpoint.save(root / kind / "checkpoints" / "step_00000001.pt", run.state_dict())
    return {kind: root / kind for kind in KINDS}


def gannorm(*args) -> None:
    with answering_requests():
        arguments = parser().parse_args([str(a) for a in args])
        arguments.run(arguments)


def translate(run, source, target, *options) -> None:
    gannorm("translate", run, source, target, "--direction", "AtoB", *options)


def failed(capsys, *args) -> str:
    """The last line of a translation that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        translate(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def names(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path), dtype=int)


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shapes, darker to the right: no two parts of it have the same statistics."""
    low = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    smooth = np.array(Image.fromarray(low.astype(np.uint8)).resize((width, height), 3), float)
    return Image.fromarray((smooth * np.linspace(1, 0.3, width)[:, None]).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    scene(30, 50, 1).save(folder / "wide.png")
    scene(50, 30, 2).save(folder / "high.png")
    scene(30, 50, 3).save(folder / "more" / "wide.png")
    return folder


# ---- tiles


def test_tile_options(runs, tmp_path, capsys, monkeypatch):
    scene(90, 70).save(tmp_path / "x.png")
    asked = []
    strips = Tiler.strips
    monkeypatch.setattr(
        Tiler, "strips", lambda self, *a: asked.append(self.tile) or strips(self, *a)
    )
    translate(runs["colour"], tmp_path / "x.png", tmp_path / "whole")
    translate(runs["colour"], tmp_path / "x.png", tmp_path / "tiled", "--tile", 16)
    assert asked == [16]
    whole, tiled = (pixels(tmp_path / each / "x.png") for each in ("whole", "tiled"))
    assert whole.shape == tiled.shape == (90, 70, 3) and np.abs(whole - tiled).max() <= 1
    monkeypatch.setattr("gannorm.commands.translation.WHOLE", 90 * 70)
    translate(runs["colour"], tmp_path / "x.png", tmp_path / "auto")  # padded it is larger
    translate(runs["colour"], tmp_path / "x.png", tmp_path / "never", "--tile", 0)
    assert asked == [16, 512] and names(tmp_path / "never") == ["x.png"]
    assert "--tile -1" in failed(
        capsys, runs["colour"], tmp_path / "x.png", tmp_path / "no", "--tile", -1
    )
    assert not (tmp_path / "no").exists()


# ---- sizes


@pytest.mark.parametrize(
    "option,wide,high",
    [
        ("native", (50, 30), (30, 50)),
        ("train", (40, 24), (24, 40)),  # width, height; trained on 24
        ("18", (30, 18), (18, 30)),
        ("45", (75, 45), (45, 75)),
        ("20x33", (33, 20), (33, 20)),
    ],
)
def test_sizes(runs, photos, tmp_path, option, wide, high):
    translate(runs["colour"], photos, tmp_path / "out", "--size", option)
    sizes = {name: Image.open(tmp_path / "out" / name).size for name in names(tmp_path / "out")}
    assert sizes == {"high.png": high, "more/wide.png": wide, "wide.png": wide}


def test_a_size_is_as_resized_before(runs, photos, tmp_path):
    translate(runs["colour"], photos / "wide.png", tmp_path / "a", "--size", "train")
    bicubic = Image.open(photos / "wide.png").resize((40, 24), Image.Resampling.BICUBIC)
    bicubic.save(tmp_path / "small.png")
    translate(runs["colour"], tmp_path / "small.png", tmp_path / "b")
    assert (pixels(tmp_path / "a" / "wide.png") == pixels(tmp_path / "b" / "small.png")).all()


@pytest.mark.parametrize("size", ["0", "-3", "big", "12x", "12x0", "1x2x3", ""])
def test_sizes_that_are_none(runs, photos, tmp_path, capsys, size):
    said = failed(capsys, runs["colour"], photos, tmp_path / "out", f"--size={size}")
    assert f"--size {size}:" in said and not (tmp_path / "out").exists()


def test_the_training_size_of_rectangles():
    assert parse_size("train", (48, 32)) == [32] and parse_size("48X32", (1, 1)) == [48, 32]


# ---- which files


def test_one_file(runs, photos, tmp_path, capsys):
    translate(runs["colour"], photos / "wide.png", tmp_path / "out")
    assert capsys.readouterr().out == f"1 images in {tmp_path / 'out'}\n"
    assert names(tmp_path / "out") == ["wide.png"]
    before = (photos / "wide.png").read_bytes()
    assert "overwritten" in failed(capsys, runs["colour"], photos / "wide.png", photos)
    assert "overwritten" in failed(capsys, runs["colour"], photos / "more", photos / "more")
    (tmp_path / "notes.txt").touch()
    said = failed(capsys, runs["colour"], tmp_path / "notes.txt", tmp_path / "other")
    assert "notes.txt is no image or video" in said and not (tmp_path / "other").exists()
    assert (photos / "wide.png").read_bytes() == before


def test_a_source_below_the_output_folder_is_not_overwritten(runs, photos, tmp_path, capsys):
    """photos/more/more/wide.png would become photos/more/wide.png."""
    (photos / "more" / "more").mkdir()
    shutil.copy(photos / "high.png", photos / "more" / "more" / "wide.png")
    before = (photos / "more" / "wide.png").read_bytes()
    said = failed(capsys, runs["colour"], photos / "more", photos)
    assert str(photos / "more" / "wide.png") in said and "overwritten" in said
    assert (photos / "more" / "wide.png").read_bytes() == before
    (photos / "more" / "wide.png").unlink()
    translate(runs["colour"], photos / "more", photos)
    assert (photos / "more" / "wide.png").exists()


def test_names_with_a_dot_are_no_images(runs, photos, tmp_path, capsys):
    (photos / "._wide.png").write_bytes(b"of a Mac")
    (photos / ".thumbnails").mkdir()
    scene(8, 8).save(photos / ".thumbnails" / "x.png")
    hidden = tmp_path / ".hidden"
    shutil.copytree(photos, hidden)
    for folder in (photos, hidden):  # its own name is the user's affair
        out = tmp_path / "out" / folder.name
        translate(runs["colour"], folder, out)
        assert names(out) == ["high.png", "more/wide.png", "wide.png"]


def test_linked_folders_are_followed(runs, photos, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "linked").symlink_to(photos)
    translate(runs["colour"], tmp_path / "album", tmp_path / "out")
    found = [p for p in (tmp_path / "out" / "linked").rglob("*.png")]
    assert len(found) == len([p for p in photos.rglob("*") if p.is_file()])


def test_all_unreadable_files_are_named(runs, photos, tmp_path, capsys):
    for n in range(23):
        (photos / f"bad{n:02d}.jpg").write_bytes(b"no image")
    said = failed(capsys, runs["colour"], photos, tmp_path / "out")
    assert said.startswith("error: 23 of 26 not translated: ")
    assert all(f"bad{n:02d}.jpg" in said for n in range(20)) and said.endswith("; and 3 more")
    assert "bad20" not in said and len(names(tmp_path / "out")) == 3


# ---- batches, comparisons, device, precision


@pytest.mark.parametrize("batch", [2, 3, 50])
def test_batches_change_nothing(runs, photos, tmp_path, batch, monkeypatch):
    for n in range(4):
        scene(30, 50, 10 + n).save(photos / f"z{n}.png")
    translate(runs["colour"], photos, tmp_path / "one")
    seen = []
    call = Translator.__call__
    monkeypatch.setattr(
        Translator, "__call__", lambda self, x: seen.append(len(x)) or call(self, x)
    )
    translate(runs["colour"], photos, tmp_path / "many", "--batch", batch)
    assert sorted(seen) == {2: [1, 2, 2, 2], 3: [1, 3, 3], 50: [1, 6]}[batch]
    assert names(tmp_path / "many") == names(tmp_path / "one")
    for name in names(tmp_path / "one"):
        one, many = (pixels(tmp_path / each / name) for each in ("one", "many"))
        assert np.abs(one - many).max() <= 1


def test_many_sizes_are_not_all_kept(runs, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for n in range(12):
        scene(20 + n, 30, n).save(tmp_path / "in" / f"{n}.png")
    kept = []
    take = _Job.take
    monkeypatch.setattr(
        _Job, "take", lambda self, *a: take(self, *a) or kept.append(len(self.waiting))
    )
    translate(runs["colour"], tmp_path / "in", tmp_path / "out", "--batch", 2)
    assert max(kept) == 7 and len(names(tmp_path / "out")) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_compare(runs, photos, tmp_path, kind):
    for option in ([], ["--compare"]):
        out = tmp_path / ("both" if option else "alone")
        translate(runs[kind], photos / "wide.png", out, "--size", "train", *option)
    pair, alone = (pixels(tmp_path / each / "wide.png") for each in ("both", "alone"))
    assert pair.shape[:2] == (24, 80) and alone.shape[:2] == (24, 40)
    assert (pair[:, 40:] == alone).all()
    source = Image.open(photos / "wide.png").convert("L" if kind == "grey" else "RGB")
    assert (pair[:, :40] == np.array(source.resize((40, 24), Image.Resampling.BICUBIC))).all()


def test_precision(runs, photos, tmp_path, capsys):
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        translate(runs["colour"], photos / "wide.png", out, "--precision", precision)
    full, half = (pixels(tmp_path / each / "wide.png") for each in ("fp32", "bf16"))
    assert 0 < np.abs(full - half).mean() < 8
    said = failed(
        capsys, runs["colour"], photos, tmp_path / "no", "--device", "cpu", "--precision", "fp16"
    )
    assert "--precision fp16 needs a GPU" in said and "bf16" in said
    if not torch.cuda.is_available():
        said = failed(capsys, runs["colour"], photos, tmp_path / "no", "--device", "cuda")
        assert "--device cuda: no GPU" in said
    assert "--batch 0" in failed(capsys, runs["colour"], photos, tmp_path / "no", "--batch", 0)
    assert not (tmp_path / "no").exists()


def test_domains_of_different_channels(photos, tmp_path, monkeypatch):
    """The picture is read in the channels of its own domain."""
    from gannorm.schema import DataConfig

    monkeypatch.setattr(DataConfig, "channel_pair", property(lambda self: (1, 3)))
    task = build_task(typed(config(*SMALL)), CPU, None)
    for side, (direction, given) in enumerate((("AtoB", 1), ("BtoA", 3))):
        name = ("G_A", "G_B")[side]
        task.averaged[name] = generator("model.downsamplings=2", channels=(given, 4 - given))
        for compare in (False, True):
            made = Translator(
                task, direction, "native", 16, compare, "fp32", tmp_path
            )  # fmt: skip
            image = made.read(photos / "wide.png")
            (got,) = made([image])
            assert len(image) == given and got.dtype == torch.uint8
            assert got.shape == ((3, 30, 100) if compare else (4 - given, 30, 50))


# ---- videos


def make_video(path, frames, rate=10, codec="libx264", size=(36, 52)):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "10"}
        for n in range(frames):
            image = np.array(scene(*size, 1)) // 2 + 10 * n
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), "rgb24")))
        file.mux(stream.encode())


def read_video(path):
    """Its rate, and its frames in the colours that the file says they have."""
    import av

    with av.open(str(path)) as file:
        rate, frames = file.streams.video[0].average_rate, []
        for frame in file.decode(video=0):
            said = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"}
            frames.append(np.array(frame.to_image(**said if frame.colorspace == 1 else {}), int))
        return rate, frames


@pytest.mark.slow
def test_video_as_a_user_runs_it(runs, photos, tmp_path):
    make_video(photos / "clip.mov", 10)
    result = subprocess.run(
        [sys.executable, "-m", "gannorm", "translate", runs["colour"], photos, tmp_path / "out",
         "--direction", "AtoB", "--batch", "4"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"3 images and 1 videos in {tmp_path / 'out'}\n"
    assert names(tmp_path / "out") == ["clip.mp4", "high.png", "more/wide.png", "wide.png"]
    rate, got = read_video(tmp_path / "out" / "clip.mp4")
    _, source = read_video(photos / "clip.mov")
    assert rate == 10 and len(got) == len(source) == 10
    (tmp_path / "frames").mkdir()
    for n, frame in enumerate(source):
        Image.fromarray(frame.astype(np.uint8)).save(tmp_path / "frames" / f"{n}.png")
    translate(runs["colour"], tmp_path / "frames", tmp_path / "each")
    for n, frame in enumerate(got):
        expected = pixels(tmp_path / "each" / f"{n}.png")
        assert frame.shape == expected.shape == (36, 52, 3)
        # Colours are kept at half the size: of noise as this the brightness is what stays.
        brightness = [each @ (0.2126, 0.7152, 0.0722) for each in (frame, expected)]
        assert np.corrcoef(*(each.ravel() for each in brightness))[0, 1] > 0.98
        assert np.abs(frame.mean((0, 1)) - expected.mean((0, 1))).max() < 6


@pytest.mark.parametrize("option,size", [("17x21", (18, 22)), ("18", (18, 26))])
def test_a_video_s_size_is_made_even(runs, tmp_path, option, size):
    make_video(tmp_path / "clip.avi", 3, rate=25, codec="mpeg4")
    translate(runs["grey"], tmp_path / "clip.avi", tmp_path / "out", "--size", option)
    rate, frames = read_video(tmp_path / "out" / "clip.mp4")
    assert rate == 25 and [frame.shape for frame in frames] == [(*size, 3)] * 3
    assert np.abs(frames[0] - frames[0].mean(2, keepdims=True)).max() <= 3  # grey


def test_a_video_keeps_its_colours(tmp_path):
    """Written and read again, by the matrix of BT.709."""
    from gannorm.commands.video import translate_video

    make_video(tmp_path / "in.mp4", 1)
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 60, 30), (20, 90, 210)
    for source, target in (("in.mp4", "a.mp4"), ("a.mp4", "b.mp4")):
        made = [Image.fromarray(image)] if target == "a.mp4" else None
        translate_video(
            tmp_path / source, tmp_path / target, lambda x, made=made: made or x, batch=1
        )
    for name in "ab":
        _, (got,) = read_video(tmp_path / f"{name}.mp4")
        assert np.abs(got[8:40, 8:24] - image[8:40, 8:24]).max() <= 5
        assert np.abs(got[8:40, 40:56] - image[8:40, 40:56]).max() <= 5


def test_a_video_beside_its_translation(runs, tmp_path):
    make_video(tmp_path / "clip.mp4", 2)
    translate(runs["colour"], tmp_path / "clip.mp4", tmp_path / "out", "--compare", "--tile", 16)
    _, frames = read_video(tmp_path / "out" / "clip.mp4")
    _, source = read_video(tmp_path / "clip.mp4")
    assert frames[0].shape == (36, 104, 3) and np.abs(frames[1][:, :52] - source[1]).mean() < 4


def test_a_telephone_held_upright(runs, tmp_path):
    """The file says by a matrix how its frames are to be turned."""
    make_video(tmp_path / "clip.mp4", 2)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track's header, in 16.16
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in quarter)
    (tmp_path / "clip.mp4").write_bytes(data)
    translate(runs["colour"], tmp_path / "clip.mp4", tmp_path / "out", "--compare")
    _, frames = read_video(tmp_path / "out" / "clip.mp4")
    _, source = read_video(tmp_path / "clip.mp4")
    assert frames[0].shape == (52, 72, 3)
    upright = np.rot90(source[0], -1)  # players turn it clockwise by this matrix
    assert np.abs(frames[0][:, :36] - upright).mean() < 4


def test_damaged_videos_are_named_and_nothing_is_left(runs, photos, tmp_path, capsys):
    make_video(photos / "good.mp4", 4)
    (photos / "cut.mp4").write_bytes((photos / "good.mp4").read_bytes()[:300])
    (photos / "none.webm").write_bytes(b"no video")
    (photos / "empty.avi").touch()
    said = failed(capsys, runs["colour"], photos, tmp_path / "out")
    assert said.startswith("error: 3 of 7 not translated: ")
    assert all(name in said for name in ("cut.mp4", "none.webm", "empty.avi"))
    assert names(tmp_path / "out") == ["good.mp4", "high.png", "more/wide.png", "wide.png"]


def test_videos_without_pyav(runs, photos, tmp_path, capsys, monkeypatch):
    (photos / "clip.mp4").touch()
    monkeypatch.setattr(
        "gannorm.commands.video.find_spec", lambda name: None if name == "av" else find_spec(name)
    )
    said = failed(capsys, runs["colour"], photos, tmp_path / "out")
    assert "clip.mp4" in said and "pip install av" in said and not (tmp_path / "out").exists()
    (photos / "clip.mp4").unlink()
    translate(runs["colour"], photos, tmp_path / "out")


def test_videos_and_their_names(runs, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.mp4", "a.png"):
        (folder / name).touch()
    (folder / "a.mkv").touch()
    said = failed(capsys, runs["colour"], folder, tmp_path / "out")
    assert "a.mkv" in said and "a.mp4" in said and "would both become" in said


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        gannorm("translate", "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Which size" in text and text.rstrip().endswith("--direction AtoB --size train")
