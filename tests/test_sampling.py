"""Classes by name, from a folder of photographs to the samples; seeds, grids, interpolations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from test_inference import CONDITIONAL, ROOT, command, gannorm, make_run, names, pixels, refused

from gannorm.commands.classes import file_names, pick_classes, pick_seeds
from gannorm.commands.sampling import sample
from gannorm.commands.trained import load_task
from gannorm.errors import RequestError
from gannorm.metrics import features
from gannorm.training import checkpoint
from gannorm.training.captions import PADDING, elided, font, sheet
from gannorm.training.loop import train

NAMES = ["cat", "dog", "größer fisch", "vogel/../x"]


def named_run(folder: Path, names: list[str] | None, overrides=()) -> Path:
    run = make_run(folder, [*CONDITIONAL, *overrides], 4)
    run.task.class_names = names or run.task.class_names
    checkpoint.save(folder / "checkpoints" / "step_00000001.pt", run.state_dict())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return named_run(tmp_path_factory.mktemp("named") / "run", NAMES)


def photos(root: Path, classes: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(6):
            noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")
    return root


def trained(root: Path, out: Path, *overrides: str) -> dict:
    with (
        pytest.MonkeyPatch.context() as patch,
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
    ):
        patch.setattr(features, "STEPS", 2)
        settings = [
            *CONDITIONAL, "data=image_folder", f"data.root={root}", "data.load_size=8",
            "data.batch_size=4", "data.num_workers=0", "trainer.steps=2", "metrics.samples=12",
            f"metrics.cache={out.parent / 'cache'}", *overrides,
        ]  # fmt: skip
        return train(compose("config", settings), out)


# ---- from the folders to the samples


def test_folders_names_reach_the_samples_and_the_pictures(tmp_path, capsys):
    """Trained on photographs, sampled by name; the pictures of the run show the names."""
    classes = ["Katze", "Äffchen", "zebra"]
    root = photos(tmp_path / "photos", classes)
    summary = trained(root, tmp_path / "run")
    order = sorted(classes)
    assert load_task(tmp_path / "run").class_names == order
    assert {k for k in summary["quality"] if "/" in k} >= {"class_accuracy/0", "class_accuracy/2"}
    gannorm("sample", tmp_path / "run", "--class", "Äffchen", "--count", 1, "--out", tmp_path / "s")
    assert names(tmp_path / "s") == ["classÄffchen_seed0_00000.png"]
    # Three rows of ten, and the names at the left of them.
    shown = pixels(tmp_path / "run" / "samples" / "step_00000002.png")
    grid = 10 * 100 + 4
    assert shown.shape[0] == 3 * 100 + 4 and shown.shape[1] > grid + 30
    for row in range(3):
        margin = shown[row * 100 + 4 : row * 100 + 100, : shown.shape[1] - grid]
        assert margin.min() < 60 and (margin > 250).mean() > 0.7

    (root / "zebra").rename(root / "Esel")
    with pytest.raises(RequestError, match="gone: zebra; new: Esel"):
        trained(root, tmp_path / "run", "resume=auto", "trainer.steps=3")
    (root / "Esel").rename(root / "zebra")
    trained(root, tmp_path / "run", "resume=auto", "trainer.steps=3")


def test_older_checkpoints_have_numbers(tmp_path, capsys):
    folder = named_run(tmp_path / "run", NAMES)
    file = folder / "checkpoints" / "step_00000001.pt"
    state = checkpoint.load(file)
    del state["class_names"]
    checkpoint.save(file, state)
    assert load_task(folder).class_names == ["0", "1", "2", "3"]
    assert "has classes 0 to 3" in refused(capsys, "sample", folder, "--class", "cat")
    gannorm("sample", folder, "--class", 2, "--count", 1, "--out", tmp_path / "s")
    assert names(tmp_path / "s") == ["class2_seed0_00000.png"]


# ---- names


def test_a_name_comes_before_a_number():
    assert pick_classes(["5", "0", "x,y", "x"], ["0", "2", "x,y", "x,5", 3]) == [1, 2, 3, 0]


@pytest.mark.parametrize(
    "word,said",
    [
        ("catt", "has classes cat, dog, größer fisch, vogel/../x, by number 0 to 3 (did you mean"),
        ("cat,4", "--class 4: "),
        ("-1", "--class -1: "),
        ("", "--class : "),
        ("²", "--class ²: "),
    ],
)
def test_unknown_classes_are_refused_with_the_names(run, capsys, tmp_path, word, said):
    assert said in refused(capsys, "sample", run, "--class", word, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_many_classes_are_not_all_listed():
    with pytest.raises(RequestError, match=r"c19 and 80 more, by number 0 to 99"):
        pick_classes([f"c{k}" for k in range(100)], ["zzz"])


def test_file_names_are_safe_and_differ():
    found = file_names(["a/b", "a:b", "A_B", "..", "größe", "x" * 300, "猫" * 100, "a.b"])
    assert found == [
        "a_b", "a_b_1", "A_B_2", "_", "größe", "x" * 120, "猫" * 40, "a.b",
    ]  # fmt: skip
    assert len({name.casefold() for name in found}) == len(found)


# ---- seeds


def test_a_seeds_image_depends_on_nothing_else(run, tmp_path):
    result = command(
        "sample", run, "--class", "dog,3", "--class", "cat", "--seeds", "5,0-2", "--out",
        tmp_path / "many",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"12 images in {tmp_path / 'many'}\n"
    safe = ["cat", "dog", "vogel___x"]
    expected = sorted(f"class{name}_seed{s}.png" for name in safe for s in (0, 1, 2, 5))
    assert names(tmp_path / "many") == expected
    gannorm("sample", run, "--class", 3, "--seeds", 5, "--out", tmp_path / "one")
    (only,) = names(tmp_path / "one")
    assert (tmp_path / "one" / only).read_bytes() == (tmp_path / "many" / only).read_bytes()
    assert len({(tmp_path / "many" / name).read_bytes() for name in expected}) == 12
    # It is the first image of the stream of that --seed.
    gannorm("sample", run, "--class", 3, "--seed", 5, "--count", 1, "--out", tmp_path / "stream")
    stream = pixels(tmp_path / "stream" / "classvogel___x_seed5_00000.png")
    assert np.abs(stream - pixels(tmp_path / "one" / only)).max() <= 1


def test_several_classes_take_turns(run, tmp_path):
    gannorm("sample", run, "--class", "dog,cat", "--count", 3, "--out", tmp_path)
    assert names(tmp_path) == [
        "classcat_seed0_00001.png", "classdog_seed0_00000.png", "classdog_seed0_00002.png",
    ]  # fmt: skip


def test_seeds_as_text():
    assert pick_seeds("0-3, 7,2 ,10-10") == [0, 1, 2, 3, 7, 10]
    for text in ("", "a", "-1", "3-", "1.5", "1,,2", "²"):
        with pytest.raises(RequestError, match="is no seed"):
            pick_seeds(text)
    with pytest.raises(RequestError, match="write 1-9"):
        pick_seeds("9-1")
    with pytest.raises(RequestError, match="more than 100000"):
        pick_seeds("0-99999999999")


def test_the_function_takes_keywords(run, tmp_path):
    sample(path=run, label=1, count=1, seed=3, out=tmp_path / "a", truncation=None)
    assert names(tmp_path / "a") == ["classdog_seed3_00000.png"]
    sample(run, ["cat", 1], seeds=[4], out=tmp_path / "b")
    assert names(tmp_path / "b") == ["classcat_seed4.png", "classdog_seed4.png"]


# ---- pictures


def tile(picture: np.ndarray, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """Tile of a grid of 96-pixel tiles that ends at the right and bottom border."""
    top, left = (picture.shape[i] - (n * 100 + 4) for i, n in ((0, rows), (1, columns)))
    y, x = top + 4 + 100 * row, left + 4 + 100 * column
    return picture[y : y + 96, x : x + 96]


def single(run, tmp_path, label, seed, *more) -> np.ndarray:
    """The 8-pixel image of a class and a seed as 96 pixels."""
    out = tmp_path / f"{label}_{seed}"
    gannorm("sample", run, "--class", label, "--seeds", seed, *more, "--out", out)
    (name,) = names(out)
    return pixels(out / name).repeat(12, 0).repeat(12, 1)


def test_grid(run, tmp_path):
    """Rows of classes with their names, columns of seeds: each the image of the two."""
    gannorm("sample", run, "--grid", "--seeds", "3,9", "--class", "dog,2,cat", "--out", tmp_path)
    assert names(tmp_path) == ["grid.png"]
    picture = pixels(tmp_path / "grid.png")
    for row, label in enumerate((1, 2, 0)):
        for column, seed in enumerate((3, 9)):
            expected = single(run, tmp_path, label, seed)
            assert (tile(picture, row, column, 3, 2) == expected).all()
    left = picture.shape[1] - 204
    widths = []
    for row in range(3):  # the longer the name, the more of the margin is inked
        band = picture[picture.shape[0] - 304 + 100 * row :][4:100, :left]
        widths.append(np.ptp(np.nonzero(band.min((0, 2)) < 128)[0]))
    assert widths[1] > 2 * widths[0] > 0
    assert picture[: picture.shape[0] - 304].min() < 128  # seeds above
    gannorm("sample", run, "--grid", "--out", tmp_path)
    shape = pixels(tmp_path / "grid.png").shape
    assert shape[0] > 404 and shape[1] > 1004  # four classes by ten seeds


@pytest.mark.parametrize("norm", ["conditional_batch", "batch", "conditional_instance"])
def test_interpolation_between_classes(tmp_path, norm):
    """Its ends are the classes' own images; what lies between moves from one to the other."""
    run = named_run(tmp_path / "run", NAMES, [f"norm={norm}"])
    out = tmp_path / "out"
    gannorm("sample", run, "--class", "dog,cat", "--interpolate", 5, "--seeds", 6, "--out", out)
    assert names(out) == ["classdog_to_classcat_seed6_5.png"]
    ends_and_between(pixels(out / names(out)[0]), run, tmp_path, (("dog", 6), ("cat", 6)))


def test_interpolation_between_seeds(run, tmp_path):
    more, out = ("--truncation", 0.7), tmp_path / "out"
    args = "--class", 2, "--interpolate", 5, "--seeds", "6,1", *more, "--out", out
    gannorm("sample", run, *args)
    assert names(out) == ["classgrößer fisch_seed6_to_seed1_5.png"]
    ends_and_between(pixels(out / names(out)[0]), run, tmp_path, ((2, 6), (2, 1)), *more)


def ends_and_between(picture, run, tmp_path, ends, *more):
    assert picture.shape == (104, 504, 3)
    tiles = [tile(picture, 0, i, 1, 5) for i in range(5)]
    first, last = (single(run, tmp_path, *end, *more) for end in ends)
    assert np.abs(tiles[0] - first).max() <= 1 and np.abs(tiles[-1] - last).max() <= 1
    away = [np.abs(t - first).mean() for t in tiles]
    assert away[0] < away[1] < away[-1] and away[0] < away[2]
    assert np.abs(tiles[3] - last).mean() < np.abs(tiles[1] - last).mean()


@pytest.mark.parametrize(
    "args,words",
    [
        (("--interpolate", 1, "--class", "cat,dog"), "--interpolate 1 must be 2 to 1000"),
        (("--interpolate", 4, "--class", "cat"), "not 1 classes and 1 seeds"),
        (("--interpolate", 4), "not 4 classes and 1 seeds"),
        (("--interpolate", 4, "--class", "cat", "--seeds", "3,3"), "not 1 classes and 1 seeds"),
        (("--interpolate", 4, "--class", "cat,dog", "--grid"), "one at a time"),
        (("--seeds", "0-3", "--count", 4), "do not go together"),
        (("--grid", "--seed", 4), "do not go together"),
        (("--grid", "--seeds", "0-2500"), "more than 10000"),
        (("--seeds", "x"), "--seeds x"),
    ],
)
def test_refusals(run, tmp_path, capsys, args, words):
    assert words in refused(capsys, "sample", run, *args, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_long_names_end_in_dots():
    assert elided("cat", 20, 200) == "cat"
    short = elided("a" * 300, 20, 200)
    assert short.endswith("…") and 170 < font(20).getlength(short) <= 200
    images = torch.zeros(4, 1, 8, 8)
    plain, named = sheet(images, 2), sheet(images, 2, ["a" * 300, "b"], ["c" * 300, "d"])
    assert plain.shape == (3, 2 * 100 + PADDING, 2 * 100 + PADDING)
    assert named.shape[2] <= plain.shape[2] + 14 * 19 + 16
    assert torch.equal(named[:, -plain.shape[1] :, -plain.shape[2] :], plain)
    blank = sheet(images, 2, ["", ""])  # and no name is none
    assert blank.shape[1] == plain.shape[1]
