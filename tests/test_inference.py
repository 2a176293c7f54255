"""`python -m gannorm sample` and `translate`, as a user runs them, on untrained tiny models."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from gannorm.__main__ import parser
from gannorm.config import typed
from gannorm.errors import answering_requests
from gannorm.tasks import build_task
from gannorm.training import checkpoint
from gannorm.training.run import Run

ROOT = Path(__file__).parents[1]
CONDITIONAL = [
    "model=resblock_gan", "model.z_dim=8", "model.g_widths=[8,8]", "model.d_widths=[8]",
    "model.d_downsamplings=1", "data.image_size=8",
]  # fmt: skip
TRANSLATION = ["model.width=4", "model.blocks=1", "model.d_width=4"]


def make_run(folder: Path, overrides: list[str], classes: int | None) -> Run:
    """A run folder with one checkpoint, whose averaged weights differ from the others."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose("config", overrides)
    torch.manual_seed(0)
    task = build_task(typed(raw), torch.device("cpu"), classes)
    for net in task.averaged.values():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    run = Run(task, OmegaConf.to_container(raw, resolve=True), step=1)
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder / "checkpoints" / "step_00000001.pt", run.state_dict())
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run folders by kind, and the tasks that they were made of."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {
        "sample": (CONDITIONAL, 10),
        "translate": (TRANSLATION, None),
        "grey": ([*TRANSLATION, "data.channels=1", "norm=batch"], None),
    }
    return {kind: (root / kind, make_run(root / kind, *args).task) for kind, args in kinds.items()}


@pytest.fixture(scope="module")
def runs(made):
    return {kind: folder for kind, (folder, _) in made.items()}


def gannorm(*args) -> None:
    """The command line, in this process."""
    with answering_requests():
        arguments = parser().parse_args([str(a) for a in args])
        arguments.run(arguments)


def refused(capsys, *args) -> str:
    """The one line of a request that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        gannorm(*args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gannorm", *map(str, args)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def names(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path), dtype=int)


def levels(images: torch.Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] as grey levels (N, H, W, C)."""
    return ((images.detach() + 1) * 127.5).permute(0, 2, 3, 1).numpy()


# ---- sample


def test_sample_as_a_user_runs_it(runs, tmp_path):
    result = command("sample", runs["sample"], "--class", 3, "--count", 3, "--out", tmp_path / "s")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"3 images in {tmp_path / 's'}\n"
    assert names(tmp_path / "s") == [f"class3_seed0_0000{i}.png" for i in range(3)]


def test_sample_uses_the_averaged_generator(made, tmp_path):
    """And the documented noise: of the seed, image after image; the classes take turns."""
    folder, task = made["sample"]
    gannorm("sample", folder, "--count", 12, "--seed", 7, "--out", tmp_path)
    labels = torch.arange(12) % 10
    expected = [f"class{k}_seed7_{i:05d}.png" for i, k in enumerate(labels.tolist())]
    assert names(tmp_path) == sorted(expected)
    images = np.stack([pixels(tmp_path / name) for name in expected])
    assert images.shape == (12, 8, 8, 3)
    noise = torch.randn(64, 8, generator=torch.Generator().manual_seed(7))[:12]
    assert np.abs(images - levels(task.averaged["G"](noise, labels))).max() < 2
    assert np.abs(images - levels(task.generators["G"].eval()(noise, labels))).mean() > 5


def test_same_seed_same_images_whatever_the_count(runs, tmp_path):
    for out, count, seed in (("few", 3, 0), ("many", 70, 0), ("other", 3, 1)):
        args = "--class", 4, "--count", count, "--seed", seed, "--out", tmp_path / out
        gannorm("sample", runs["sample"], *args)
    few, many, other = (tmp_path / name for name in ("few", "many", "other"))
    assert len(names(many)) == 70 and len(names(few)) == 3
    for name in names(few):
        assert (few / name).read_bytes() == (many / name).read_bytes()
        assert (pixels(few / name) != pixels(other / name.replace("seed0", "seed1"))).any()
    assert len({(many / name).read_bytes() for name in names(many)}) == 70  # no noise twice


def test_truncation_keeps_the_noise_within_it(made, tmp_path, monkeypatch):
    """Normal noise without its tails, from the seed; less varied images."""
    folder, task = made["sample"]
    seen = []

    def watched(*arguments):
        net = build_task(*arguments)
        net.averaged["G"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return net

    monkeypatch.setattr("gannorm.commands.trained.build_task", watched)
    spread = {}
    for name, extra in (("all", []), ("within", ["--truncation", 0.5])):
        out = tmp_path / name
        gannorm("sample", folder, "--class", 3, "--count", 60, *extra, "--out", out)
        spread[name] = np.stack([pixels(out / each) for each in names(out)]).std(0).mean()
    plain, truncated = seen
    assert plain.abs().max() > 2 and truncated.shape == plain.shape
    assert 0.45 < truncated.abs().max() <= 0.5 and len(truncated.unique()) > 500
    # The normal density between -0.5 and 0.5 is nearly flat: its deviation is 0.283.
    assert abs(float(truncated.std()) - 0.283) < 0.02
    assert 0 < spread["within"] < 0.7 * spread["all"]
    again = tmp_path / "again"
    gannorm("sample", folder, "--class", 3, "--count", 2, "--truncation", 0.5, "--out", again)
    for each in names(again):
        assert (again / each).read_bytes() == (tmp_path / "within" / each).read_bytes()


def test_the_class_changes_the_image(runs, tmp_path):
    for k in (0, 9):
        gannorm("sample", runs["sample"], "--class", k, "--count", 2, "--out", tmp_path)
    for i in range(2):
        zero, nine = (pixels(tmp_path / f"class{k}_seed0_0000{i}.png") for k in (0, 9))
        assert (zero != nine).any()


@pytest.mark.parametrize(
    "args,words",
    [
        (("--class", 10), "--class 10: the model has classes 0 to 9"),
        (("--truncation", 0), "--truncation 0.0 must be positive"),
        (("--truncation", "nan"), "--truncation nan must be positive"),
        (("--class", -1), "--class -1"),
        (("--count", 0), "--count 0"),
        (("--count", -5), "--count -5"),
        (("--seed", 2**70), "--seed"),
    ],
)
def test_sample_refusals(runs, tmp_path, capsys, args, words):
    assert words in refused(capsys, "sample", runs["sample"], *args, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_file_in_the_place_of_the_output_folder_is_refused(runs, tmp_path, capsys):
    (tmp_path / "out").touch()
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "x.png")
    calls = (
        ("sample", runs["sample"], "--out", tmp_path / "out"),
        ("translate", runs["translate"], tmp_path / "in", tmp_path / "out", "--direction", "AtoB"),
    )
    for call in calls:
        assert str(tmp_path / "out") in refused(capsys, *call)


# ---- translate

PICTURE = np.random.default_rng(0).integers(0, 256, (47, 33, 3), dtype=np.uint8)
INPUTS = {
    "1x1.png": Image.fromarray(PICTURE[:1, :1]),
    "5x7.bmp": Image.fromarray(PICTURE[:7, :5]),
    "33x47.png": Image.fromarray(PICTURE),
    "640x3.png": Image.fromarray(np.resize(PICTURE, (3, 640, 3))),
    "3x640.png": Image.fromarray(np.resize(PICTURE, (640, 3, 3))),
    "square.png": Image.fromarray(PICTURE[:32, :32]),
    "photo.of.me.JPG": Image.fromarray(PICTURE[:20, :30]),
    "deep/er/grey.png": Image.fromarray(PICTURE[:16, :18, 0]),
    "deep/rgba.png": Image.fromarray(np.concatenate([PICTURE, PICTURE[..., :1]], 2)),
    "deep/16bit.tiff": Image.fromarray(PICTURE[..., 0] * np.uint16(257)),
    "palette.gif": Image.fromarray(PICTURE[:17, :15]).quantize(16),
}
OUTPUTS = sorted(name.rpartition(".")[0] + ".png" for name in INPUTS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name, image in INPUTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


@pytest.mark.slow
def test_translate_as_a_user_runs_it(runs, inputs, tmp_path):
    """All kinds and sizes; a damaged file is reported when all the others are done."""
    shutil.copytree(inputs, tmp_path / "in")
    broken = tmp_path / "in" / "33broken.png"
    broken.write_bytes((inputs / "33x47.png").read_bytes()[:500])
    out = tmp_path / "new" / "out"
    result = command("translate", runs["translate"], tmp_path / "in", out, "--direction", "AtoB")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stdout == f"11 images in {out}\n"
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: 1 of 12 not translated") and str(broken) in last
    assert names(out) == OUTPUTS
    for name, image in INPUTS.items():
        with Image.open(out / (name.rpartition(".")[0] + ".png")) as written:
            assert (written.size, written.mode, written.format) == (image.size, "RGB", "PNG")


@pytest.mark.parametrize("direction,net", [("AtoB", "G_A"), ("BtoA", "G_B")])
def test_translate_uses_the_averaged_generator(made, inputs, tmp_path, direction, net):
    folder, task = made["translate"]
    gannorm("translate", folder, inputs, tmp_path, "--direction", direction)
    assert names(tmp_path) == OUTPUTS
    for name, (bottom, right) in {"square": (0, 0), "33x47": (1, 3), "1x1": (15, 15)}.items():
        # Odd sizes: the border repeated up to a multiple of 4, at least 16.
        x = pixels(inputs / f"{name}.png")
        height, width = x.shape[:2]
        padded = np.pad(x, ((0, bottom), (0, right), (0, 0)), "edge")
        batch = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1
        got = pixels(tmp_path / f"{name}.png")
        averaged, raw = (
            levels(nets[net](batch))[0, :height, :width]
            for nets in (task.averaged, task.generators)
        )
        assert np.abs(got - averaged).max() < 2
        if name == "square":
            assert np.abs(got - raw).mean() > 5


def test_grey_model(runs, inputs, tmp_path):
    gannorm("translate", runs["grey"], inputs, tmp_path, "--direction", "BtoA")
    assert names(tmp_path) == OUTPUTS
    for name, image in INPUTS.items():
        with Image.open(tmp_path / (name.rpartition(".")[0] + ".png")) as written:
            assert written.size == image.size and written.mode == "L"


def test_colliding_names_are_refused_before_anything_is_written(runs, tmp_path, capsys):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg", "sub/b.png"):
        Image.new("RGB", (4, 4)).save(source / name)
    call = ("translate", runs["translate"], source, tmp_path / "out", "--direction", "AtoB")
    message = refused(capsys, *call)
    assert str(source / "sub" / "b.jpg") in message and str(source / "sub" / "b.png") in message
    assert not (tmp_path / "out").exists()
    (source / "sub" / "b.jpg").rename(source / "b.jpg")  # one name in two folders is no collision
    gannorm(*call)
    assert names(tmp_path / "out") == ["a.png", "b.png", "sub/b.png"]


def test_only_damaged_files(runs, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("x.png", "y.jpg"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        gannorm(
            "translate", runs["translate"], tmp_path / "in", tmp_path / "out", "--direction", "AtoB"
        )
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "2 of 2" in last and "x.png" in last


def test_missing_and_empty_input_folders_are_refused(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("gone", "empty"):
        message = refused(
            capsys, "translate", runs["translate"], tmp_path / name, tmp_path, "--direction", "AtoB"
        )
        assert str(tmp_path / name) in message


# ---- checkpoints


def calls(kind: str, path, inputs, out):
    if kind == "sample":
        return "sample", path, "--count", 1, "--out", out
    return "translate", path, inputs, out, "--direction", "AtoB"


@pytest.mark.parametrize("kind", ["sample", "translate"])
def test_wrong_checkpoints_are_refused_by_name(runs, inputs, tmp_path, capsys, kind):
    other = runs["translate" if kind == "sample" else "sample"]
    message = refused(capsys, *calls(kind, other, inputs, tmp_path / "out"))
    assert "cyclegan" in message and "resblock_gan" in message and str(other) in message
    (tmp_path / "garbage.pt").write_bytes(b"x" * 100)
    (tmp_path / "run").mkdir()
    for name in ("gone.pt", "garbage.pt", "run"):
        path = tmp_path / name
        assert str(path) in refused(capsys, *calls(kind, path, inputs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["sample", "translate"])
def test_moved_run_folder_and_file(runs, inputs, tmp_path, kind):
    moved = tmp_path / "elsewhere" / "my run"
    shutil.copytree(runs[kind], moved)
    gannorm(*calls(kind, moved, inputs, tmp_path / "a"))
    shutil.move(moved / "checkpoints" / "step_00000001.pt", tmp_path / "model.pt")
    gannorm(*calls(kind, tmp_path / "model.pt", inputs, tmp_path / "b"))
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_newest_checkpoint_of_a_run_is_used(runs, tmp_path):
    run, name = tmp_path / "run", "step_00000001.pt"
    make_run(run, [*CONDITIONAL, "norm=conditional_instance"], 10)
    first, second = run / "checkpoints" / name, run / "checkpoints" / "step_00000002.pt"
    shutil.move(first, second)
    shutil.copy(runs["sample"] / "checkpoints" / name, first)
    read = {}
    for path in (run, first, second):
        out = tmp_path / f"from {path.stem}"
        gannorm("sample", path, "--count", 1, "--out", out)
        read[path] = (out / "class0_seed0_00000.png").read_bytes()
    assert read[run] == read[second] != read[first]


def test_model_trained_on_triton_runs_where_there_is_none(tmp_path, monkeypatch):
    """The backend is how a run computed, not what it learned."""
    make_run(tmp_path / "run", [*CONDITIONAL, "norm.backend=triton"], 10)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gannorm("sample", tmp_path / "run", "--count", 1, "--out", tmp_path / "out")
    assert len(names(tmp_path / "out")) == 1


def test_usage_errors(runs, capsys):
    for args in ((), ("paint",), ("sample",), ("translate", runs["translate"], "in", "out")):
        with pytest.raises(SystemExit) as stop:
            gannorm(*args)
        assert stop.value.code == 2
    assert "--direction" in capsys.readouterr().err
