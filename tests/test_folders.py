"""Folders of photographs: every file as Pillow reads it, or named; scaled, cropped, kept."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image, ImageOps

from gannorm.config import typed
from gannorm.data import batches, build_data
from gannorm.data.files import scaled_size
from gannorm.data.images import list_images, open_image
from gannorm.errors import RequestError
from gannorm.tasks import build_task

CONF = Path(__file__).parents[1] / "conf"
MODES = ("resize_and_crop", "scale_width_and_crop", "scale_shortside_and_crop", "crop", "none")


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", ["data.num_workers=0", *overrides]))


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> Image.Image:
    """Smooth, so that a compressed one is close."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image if channels == 3 else image.convert("L")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("trainA", "trainB", "testA")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            picture(40 + 3 * i, 60, 10 * number + i).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def pair(folder: Path, *overrides: str):
    cache = f"metrics.cache={folder.parent / 'cache'}"
    return config("data=folder_pair", f"data.root={folder}", cache, *overrides).data


def fetch(source, index=(0,), seed=0):
    return source.fetch(list(index), torch.Generator().manual_seed(seed))["image"]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


# ---- how a file becomes an image


@pytest.mark.parametrize("kept", ["data.cache_gb=0", "data.cache_gb=1"])
def test_resize_and_crop(folder, kept):
    cfg = pair(folder, "data.image_size=[24,32]", "data.load_size=[30,40]", kept)
    data = build_data(cfg)
    original = Image.open(folder / "trainA" / "1.png")
    assert torch.equal(
        fetch(data.real[0], [1])[0], pixels(original.resize((32, 24), Image.Resampling.BICUBIC))
    )
    resized = pixels(original.resize((40, 30), Image.Resampling.BICUBIC))
    both = torch.stack([resized, resized.flip(-1)])
    places, mirrored = set(), set()
    for seed in range(60):
        crop = fetch(data.domains[0], [1], seed)[0]
        assert crop.shape == (3, 24, 32)
        windows = both.unfold(2, 24, 1).unfold(3, 32, 1)  # (2, 3, 7, 9, 24, 32)
        hits = (windows == crop[None, :, None, None]).all(1).flatten(3).all(3).nonzero()
        assert len(hits) == 1
        mirrored.add(int(hits[0, 0]))
        places.add(tuple(hits[0, 1:].tolist()))
    assert mirrored == {0, 1} and len(places) > 20  # of 63
    assert max(p[0] for p in places) == 6 and max(p[1] for p in places) == 8


@pytest.mark.parametrize(
    ("mode", "load", "size"),
    [
        ("scale_width_and_crop", 48, (37, 48)),
        ("scale_shortside_and_crop", 30, (30, 39)),
        ("scale_shortside_and_crop", 46, (46, 60)),
        ("crop", 999, (46, 60)),
        ("none", 999, (48, 60)),
    ],
)
def test_the_other_ways(folder, mode, load, size):
    overrides = [f"data.preprocess={mode}", f"data.load_size={load}", "data.image_size=24"]
    cfg = pair(folder, *overrides, "data.flip=false")
    data, original = build_data(cfg), Image.open(folder / "trainA" / "2.png")
    assert scaled_size((original.height, original.width), cfg) == size
    scaled = original.resize(size[::-1], Image.Resampling.BICUBIC)
    taken, plain = fetch(data.domains[0], [2]), fetch(data.real[0], [2])
    if mode == "none":
        assert torch.equal(taken[0], pixels(scaled))
        assert torch.equal(plain[0], pixels(original.resize((24, 24), Image.Resampling.BICUBIC)))
        return
    top, left = (size[0] - 24) // 2, (size[1] - 24) // 2
    middle = scaled.crop((left, top, left + 24, top + 24))
    assert torch.equal(plain[0], pixels(middle)) and taken.shape == (1, 3, 24, 24)


def test_one_number_is_the_shorter_side(folder):
    cfg = pair(folder, "data.image_size=[24,32]", "data.load_size=27")
    assert cfg.load == (27, 36)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.load_size=20", "data.image_size=24"], "data.load_size=20 is smaller"),
        (["data.load_size=[30,20]", "data.image_size=24"], r"data.load_size=\[30, 20\] is smaller"),
        (["data.preprocess=none", "data.batch_size=2"], "set data.batch_size=1"),
        (["data.preprocess=crop", "data.image_size=44"], "too small for a crop of 44x44"),
    ],
)
def test_sizes_that_do_not_fit(folder, overrides, said):
    with pytest.raises(RequestError, match=said):
        build_data(pair(folder, *overrides))


@pytest.mark.parametrize("value", ["0", "[8]", "[8,8,8]", "8.5", "[8,-8]", "x", "true"])
def test_sizes_that_are_none(folder, value):
    with pytest.raises(RequestError, match="data.image_size"):
        pair(folder, f"data.image_size={value}")


# ---- every file as Pillow reads it


def kinds(folder: Path) -> dict[str, Image.Image]:
    """Files that cameras, phones, scanners and the web make, and what each should look like."""
    folder.mkdir(parents=True)
    image = picture(30, 44)
    expected = {}

    def put(name: str, saved: Image.Image, shown: Image.Image = image, **options) -> None:
        saved.save(folder / name, **options)
        expected[name] = shown

    exif = Image.Exif()
    exif[0x0112] = 6
    put("rotated.jpg", image, image.rotate(-90, expand=True), exif=exif, quality=100)
    put("cmyk.jpg", image.convert("CMYK"), quality=100)
    put("grey.JPEG", image.convert("L"), image.convert("L").convert("RGB"), quality=100)
    palette = image.quantize(16)
    put("palette.png", palette, palette.convert("RGB"))
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.new("L", image.size, 0))
    put("alpha.png", alpha, Image.new("RGB", image.size, "white"))
    clear = palette.copy()
    clear.info["transparency"] = 3
    on_white = Image.alpha_composite(
        Image.new("RGBA", image.size, "white"), clear.convert("RGBA")
    ).convert("RGB")
    put("palette clear.png", clear, on_white, transparency=3)
    sixteen = np.array(image.convert("L"), np.uint16) * 257
    put("sixteen.png", Image.fromarray(sixteen), image.convert("L").convert("RGB"))
    put("sixteen.TIFF", Image.fromarray(sixteen), image.convert("L").convert("RGB"))
    for name in ("web.webp", "plain.bmp", "scan.tif", "ünï çødé 写真.PNG", "a b.Png"):
        put(name, image, **({"lossless": True} if name.endswith("webp") else {}))
    return expected


def test_every_kind_of_file_reads_as_it_looks(tmp_path):
    expected = kinds(tmp_path / "kinds")
    found = list_images(tmp_path / "kinds")
    assert {p.name for p in found} == set(expected)
    for path in found:
        read, shown = open_image(path, 3), expected[path.name]
        assert read.size == shown.size
        apart = np.abs(np.array(read, float) - np.array(shown, float)).mean()
        assert apart <= (6 if "cmyk" in path.name else 2 if "jp" in path.suffix.lower() else 0)
        plain = ImageOps.exif_transpose(Image.open(path))
        if plain.mode in ("RGB", "L", "P", "CMYK") and "transparency" not in plain.info:
            assert np.array_equal(np.array(read), np.array(plain.convert("RGB")))


def test_hidden_files_links_and_circles(tmp_path):
    root, other = tmp_path / "photos", tmp_path / "elsewhere"
    for place in (root / "sub", root / ".hidden", other):
        place.mkdir(parents=True)
        picture(8, 8).save(place / "x.png")
    for name in (".DS_Store", "._x.jpg", ".x.png"):
        (root / name).write_bytes(b"Mac OS X")
    (root / "notes.txt").write_text("no image")
    (root / "linked").symlink_to(other)
    (root / "one.png").symlink_to(other / "x.png")
    (root / "sub" / "up").symlink_to(root)
    names = [p.relative_to(root).as_posix() for p in list_images(root)]
    assert names == ["linked/x.png", "one.png", "sub/x.png"]


# ---- checked before the first step


def spoil(folder: Path) -> dict[str, str]:
    """Bad files in `folder`, and what is said of each."""
    whole = (folder / "0.png").read_bytes()
    picture(50, 50).save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "cut.png").write_bytes(whole[:-40])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return {
        "truncated.jpg": "truncated", "cut.png": "", "empty.jpg": "an empty file",
        "text.png": "not an image", "gone.png": "No such file",
    }  # fmt: skip


def test_all_bad_files_are_listed_at_once(folder):
    said = spoil(folder / "trainA")
    with pytest.raises(RequestError) as refused:
        build_data(pair(folder, "data.image_size=24", "data.load_size=30"))
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("5 of 18 images cannot be used") and "data.on_bad=skip" in lines[0]
    assert len(lines) == 6
    for name, words in said.items():
        assert any(f"/{name}: " in line and words in line for line in lines[1:]), name


def test_bad_files_are_skipped_the_same_way_every_time(folder, capfd):
    clean = build_data(pair(folder, "data.image_size=24", "data.load_size=30"))
    expected = fetch(clean.domains[0], range(4))
    said = spoil(folder / "trainA")
    (folder / "trainA" / "whole.jpg").unlink()
    for _ in range(2):
        cfg = pair(folder, "data.image_size=24", "data.load_size=30", "data.on_bad=skip")
        data = build_data(cfg)
        assert len(data.domains[0]) == 4 and len(data.skipped) == len(said)
        assert torch.equal(fetch(data.domains[0], range(4)), expected)
        assert data.domains[0].digest() == clean.domains[0].digest()
    assert capfd.readouterr().err.count("skipped ") == 2 * len(said)


def test_too_small_ones_are_named_with_their_size(folder):
    picture(30, 400).save(folder / "trainA" / "panorama.png")
    mode = ["data.preprocess=scale_width_and_crop", "data.load_size=40", "data.image_size=24"]
    with pytest.raises(RequestError, match="panorama.png: 30x400 pixels, 3x40 once scaled: too"):
        build_data(pair(folder, *mode))
    data = build_data(pair(folder, *mode, "data.on_bad=skip"))
    assert len(data.domains[0]) == 4


def test_nothing_left_is_refused(folder):
    for path in (folder / "trainB").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RequestError, match="none of the 4 images of trainB"):
        build_data(pair(folder, "data.image_size=24", "data.load_size=30", "data.on_bad=skip"))


def test_files_are_decoded_once(folder, monkeypatch):
    cfg = pair(folder, "data.image_size=24", "data.load_size=30")
    first = fetch(build_data(cfg).domains[0], range(4))
    decoded = []
    read = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: decoded.append(a) or read(*a, **k))
    again = build_data(cfg)
    assert torch.equal(fetch(again.domains[0], range(4)), first) and not decoded
    picture(90, 90, 5).save(folder / "trainA" / "1.png")
    changed = build_data(cfg)
    assert len(decoded) == 1 + 4  # checked, then the set resized anew
    assert not torch.equal(fetch(changed.domains[0], range(4)), first)
    assert again.domains[0].digest() != changed.domains[0].digest()


def test_kept_pixels_that_are_gone_cut_or_not_to_be_written(folder, tmp_path):
    cfg = pair(folder, "data.image_size=24", "data.load_size=30")
    data = build_data(cfg)
    expected = fetch(data.domains[0], range(4))
    copy = pickle.loads(pickle.dumps(data.domains[0]))  # as a worker gets it
    assert copy.pixels.memory is None and torch.equal(fetch(copy, range(4)), expected)
    shutil.rmtree(tmp_path / "cache")
    gone = pickle.loads(pickle.dumps(data.domains[0]))
    assert torch.equal(fetch(gone, range(4)), expected)
    again = build_data(cfg)
    again.domains[0].pixels.path.write_bytes(b"cut")
    assert torch.equal(fetch(build_data(cfg).domains[0], range(4)), expected)
    (tmp_path / "file").write_text("no folder")
    nowhere = [f"metrics.cache={tmp_path / 'file' / 'x'}"]
    data = build_data(pair(folder, "data.image_size=24", "data.load_size=30", *nowhere))
    assert torch.equal(fetch(data.domains[0], range(4)), expected)


def test_kept_pixels_are_no_more_than_allowed(folder, tmp_path):
    for load in (30, 31, 32):  # two sets of 4 images of 3 * load**2 bytes
        gigabytes = f"data.cache_gb={3 * 8 * 32**2 / 1e9}"
        build_data(pair(folder, "data.image_size=24", f"data.load_size={load}", gigabytes))
        kept = list((tmp_path / "cache").glob("pixels-*"))
        assert sum(p.stat().st_size for p in kept) <= 3 * 8 * 32**2
        assert not list((tmp_path / "cache").glob("*.partial"))
    assert {p.stat().st_size for p in kept} == {3 * 4 * 32**2}


def test_batches_do_not_depend_on_workers_or_what_is_kept(folder):
    taken = []
    for workers, gigabytes in ((0, 0), (2, 1), (0, 1)):
        cfg = pair(folder, "data.image_size=24", "data.load_size=30", f"data.cache_gb={gigabytes}")
        domains = build_data(cfg).domains
        loader = batches(domains, batch_size=3, start=0, stop=4, seed=0, num_workers=workers)
        taken.append([each["image"] for batch in loader for each in batch])
    for other in taken[1:]:
        assert all(torch.equal(a, b) for a, b in zip(taken[0], other, strict=True))


# ---- domains of different kinds, and no classes


def test_grey_to_colour(folder):
    small = ["model.width=4", "model.blocks=1", "model.d_width=4", "data.batch_size=1"]
    grey = ["data.channels=[1,3]", "data.image_size=[24,32]", "data.load_size=30", *small]
    options = ["data=folder_pair", f"data.root={folder}", f"metrics.cache={folder.parent / 'c'}"]
    with pytest.raises(RequestError, match="model.identity_weight=0"):
        build_task(config(*options, *grey, "model.identity_weight=0.5"), torch.device("cpu"), None)
    cfg = config(*options, *grey, "model.identity_weight=0")
    data, task = build_data(cfg.data), build_task(cfg, torch.device("cpu"), None)
    batch = next(batches(data.domains, batch_size=1, start=0, stop=1, seed=0))
    assert [b["image"].shape for b in batch] == [(1, 1, 24, 32), (1, 3, 24, 32)]
    losses = task.train_step([batch])
    assert all(value.isfinite() for value in losses.values())
    assert task.averaged["G_A"](batch[0]["image"]).shape == (1, 3, 24, 32)
    assert task.averaged["G_B"](batch[1]["image"]).shape == (1, 1, 24, 32)


def test_a_conditional_norm_needs_classes(folder):
    cfg = config("model=resblock_gan", "data=image_folder", f"data.root={folder}",
                 "data.labels=false")  # fmt: skip
    with pytest.raises(RequestError, match="norm=conditional_batch.*data.labels=false.*batch"):
        build_task(cfg, torch.device("cpu"), None)


def test_images_without_classes(folder):
    small = ["model.z_dim=8", "model.g_widths=[8,8]", "model.d_widths=[8]",
             "model.d_downsamplings=1", "norm=batch", "data.image_size=8",
             "data.load_size=9"]  # fmt: skip
    cfg = config("model=resblock_gan", "data=image_folder", f"data.root={folder}",
                 "data.labels=false", f"metrics.cache={folder.parent / 'c'}", *small)  # fmt: skip
    data = build_data(cfg.data)
    assert data.num_classes is None and len(data.domains[0]) == 12
    task = build_task(cfg, torch.device("cpu"), None)
    assert not [key for key in task.discriminators["D"].state_dict() if "embedding" in key]
    (batch,) = next(batches(data.domains, batch_size=4, start=0, stop=1, seed=0))
    assert set(batch) == {"image"}
    before = [p.clone() for p in task.generators["G"].parameters()]
    losses = task.train_step([[batch]])
    assert all(value.isfinite() for value in losses.values())
    after = list(task.generators["G"].parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_the_order_of_files_is_that_of_their_names(tmp_path):
    for name in ("b.png", "a.png", "C.png"):
        picture(8, 8).save(tmp_path / name)
    assert [p.name for p in list_images(tmp_path)] == sorted(os.listdir(tmp_path))
