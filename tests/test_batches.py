"""Every data set's images, labels and held-out part; the stream of batches; refusals by name."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from digit_data import digit_data
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.nn.functional import interpolate

from gannorm.data import batches, build_data, fetch_all
from gannorm.errors import RequestError
from gannorm.schema import ImageFolderConfig

SIZE = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits(name: str = "digits", size: int = SIZE, channels: int = 3):
    return digit_data(name, size, channels, 8, 0)


def folder(name, root, size=8, load_size=12, channels=3, flip=True):
    return build_data(
        ImageFolderConfig(
            cache=os.environ["GANNORM_CACHE"],
            name=name,
            image_size=size,
            channels=channels,
            batch_size=2,
            num_workers=0,
            root=str(root),
            load_size=load_size,
            flip=flip,
        )
    )


def check_images(source, size, channels, count):
    batch = fetch_all(source)
    assert len(source) == count and batch["image"].shape == (count, channels, size, size)
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() < -0.9 and 0.9 < batch["image"].max() <= 1
    return batch


def levels_off(images: torch.Tensor, expected: np.ndarray) -> float:
    """The largest difference in grey levels; expected: (N, H, W) or (N, H, W, C) uint8."""
    levels = ((images + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    return float(np.abs(levels - expected.reshape(levels.shape)).max())


# ---- embedded digits

ORDER = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("size,channels", [(32, 3), (16, 1), (8, 1)])
def test_digits_are_scikit_learns(size, channels):
    data, bunch = digits("digits", size, channels), load_digits()
    held_out = np.arange(1797) % 5 == 0
    for source, chosen in ((data.domains[0], ~held_out), (data.test[0], held_out)):
        batch = check_images(source, size, channels, chosen.sum())
        assert batch["label"].tolist() == bunch.target[ORDER][chosen].tolist()
        assert batch["label"].bincount().min() > len(batch["label"]) / 16
        small = interpolate((batch["image"] + 1) / 2, (8, 8), mode="area")
        original = torch.from_numpy(bunch.images[ORDER][chosen])[:, None].float() / 16
        assert (
            small - original
        ).abs().max() < 0.3  # bicubic overshoots; another digit differs by 1
    assert data.num_classes == 10 and not data.counterparts
    assert fetch_all(data.test[0], 7)["image"].shape[0] == 7


def test_digits_m_domains_are_disjoint():
    data, target = digits("digits_m"), load_digits().target[ORDER]
    turn = np.arange(1797) % 5
    parts = [*data.domains, data.test[0]]
    for source, turns in zip(parts, ((1, 3), (2, 4), (0,)), strict=True):
        labels = check_images(source, SIZE, 3, np.isin(turn, turns).sum())["label"]
        assert labels.tolist() == target[np.isin(turn, turns)].tolist()
    unique = [{x.numpy().tobytes() for x in source.images} for source in parts]
    assert not (unique[0] & unique[1] or unique[0] & unique[2] or unique[1] & unique[2])
    assert data.counterparts and data.num_classes == 10


def places(image, digit, photos):
    """(photo, left edge) wherever image = |patch - digit| for a patch of the photo."""
    found = []
    image, digit = (image[0] + 1) / 2, (digit[0] + 1) / 2
    for number, photo in enumerate(photos):
        patches = photo.unfold(0, SIZE, 1).unfold(1, SIZE, 1)
        miss = ((patches - digit).abs() - image).abs().amax((2, 3))
        found += [(number, int(left)) for left in (miss < 1e-4).nonzero()[:, 1]]
    return found


def test_digits_m_is_digits_on_photographs():
    """B test is A test on the photographs' right halves, B training on the left."""
    data = digits("digits_m")
    photos = [
        interpolate(torch.tensor(p).permute(2, 0, 1)[None].float() / 255, (106, 160), mode="area")
        for p in load_sample_images().images
    ]
    photos = [p[0, 0] for p in photos]
    a, b = (fetch_all(source) for source in data.test)
    assert torch.equal(a["label"], b["label"]) and len(a["label"]) == 360
    used = set()
    for i in range(0, 360, 30):
        found = [p for p in places(b["image"][i], a["image"][i], photos) if p[1] >= 80]
        assert found
        used.add(found[0])
    assert len(used) > 6 and {photo for photo, _ in used} == {0, 1}
    source = data.domains[1]
    index = list(range(0, len(source), 60))
    images = source.fetch(index, generator(3))["image"]
    for i, image in zip(index, images, strict=True):
        assert any(left + SIZE <= 80 for _, left in places(image, source.images[i], photos))


def test_digits_m_is_reproducible_and_cut_anew_for_every_batch():
    torch.manual_seed(1)
    one = digits("digits_m")
    torch.manual_seed(2)
    two = digits("digits_m")
    for a, b in zip(one.test, two.test, strict=True):
        assert torch.equal(fetch_all(a)["image"], fetch_all(b)["image"])
        assert torch.equal(fetch_all(a)["image"], a.fetch([*range(len(a))], generator(9))["image"])
    b = one.domains[1]
    cuts = [b.fetch([0, 0, 1], generator(seed))["image"] for seed in (0, 0, 1)]
    assert torch.equal(cuts[0], cuts[1])
    assert not torch.equal(cuts[0], cuts[2]) and not torch.equal(cuts[0][0], cuts[0][1])


# ---- the stream


class Numbers:
    """Its own index, and noise from the batch's generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fetch(self, index, generator):
        noise = torch.rand(len(index), generator=generator)
        return {"index": torch.tensor(index), "noise": noise}


def stream(sources, start, stop, seed=0, workers=0, size=3):
    return list(
        batches(sources, batch_size=size, start=start, stop=stop, seed=seed, num_workers=workers)
    )


def same(one, two) -> bool:
    return all(
        torch.equal(a[key], b[key])
        for x, y in zip(one, two, strict=True)
        for a, b in zip(x, y, strict=True)
        for key in a
    )


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_every_epoch_visits_every_sample_once(size):
    sources = [Numbers(7), Numbers(10)]
    taken = stream(sources, 0, 210 // size, size=size)
    for d, source in enumerate(sources):
        order = torch.cat([batch[d]["index"] for batch in taken])
        epochs = order[: len(order) // len(source) * len(source)].view(-1, len(source))
        assert (epochs.sort().values == torch.arange(len(source))).all()
        assert len({tuple(e) for e in epochs.tolist()}) > 0.9 * len(epochs)  # reshuffled


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_k_is_a_function_of_seed_and_k(tmp_path, workers):
    """Wherever the stream starts, augmentation and patches included."""
    for name in ("trainA", "trainB"):
        (tmp_path / name).mkdir()
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 256, (14, 14, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    sources = [Numbers(7), *folder("folder_pair", tmp_path).domains, *digits("digits_m").domains]
    whole = stream(sources, 0, 8)
    assert same(whole[5:], stream(sources, 5, 8, workers=workers))
    assert same(whole, stream(sources, 0, 8, workers=workers))
    assert stream(sources, 8, 8, workers=workers) == []


def test_seeds_domains_and_batches_are_unrelated():
    sources = [Numbers(100), Numbers(100)]
    one, two = stream(sources, 0, 4, seed=0, size=25), stream(sources, 0, 4, seed=1, size=25)
    orders = {
        tuple(torch.cat([batch[d]["index"] for batch in taken]).tolist())
        for taken in (one, two)
        for d in (0, 1)
    }
    assert len(orders) == 4
    noise = torch.cat(
        [batch[d]["noise"] for taken in (one, two) for batch in taken for d in (0, 1)]
    )
    assert len(noise.unique()) == noise.numel() == 400


def states():
    return (
        torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state()),
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(tmp_path, workers):
    """A run that resumes makes one stream more than the one that never stopped."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "a" / "x.png")
    before = states()
    for data in (digits(), digits("digits_m"), folder("image_folder", tmp_path)):
        assert states() == before
        fetch_all(data.test[0])
        data.domains[-1].fetch([0, 0], generator())
        assert states() == before
        stream(data.domains, 0, 2, workers=workers)
        assert states() == before


def test_fetching_does_not_seed_the_gpus(tmp_path, monkeypatch):
    """Training draws its noise there."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "a" / "x.png")
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    stream(folder("image_folder", tmp_path).domains, 0, 2)
    assert not seeded


# ---- folders

RGB = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
KINDS = {
    "rgb.png": Image.fromarray(RGB),
    "photo.JPG": Image.fromarray(RGB).resize((30, 20)),
    "grey.png": Image.fromarray(RGB[..., 0]),
    "rgba.png": Image.fromarray(np.concatenate([RGB, RGB[..., :1]], 2)),
    "palette.gif": Image.fromarray(RGB).quantize(16),
    "deep.png": Image.fromarray(RGB[..., 0] * np.uint16(257)),
    "deep.tiff": Image.fromarray(RGB[..., 0] * np.uint16(257)),
    "sub/tiny.bmp": Image.fromarray(RGB[:1, :1]),
    "thin.webp": Image.fromarray(RGB[:2]),
}


def fill(root, kinds=KINDS):
    for name, image in kinds.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_pair_reads_every_kind(tmp_path, channels):
    for name in ("trainA", "trainB", "testA"):
        fill(tmp_path / name)
    (tmp_path / "trainA" / "notes.txt").write_text("no image")
    fill(tmp_path / "testB", {"one.png": KINDS["rgb.png"]})
    data = folder("folder_pair", tmp_path, channels=channels)
    assert [len(s) for s in data.domains + data.test] == [9, 9, 9, 1]
    assert data.num_classes is None and not data.counterparts
    for source in data.domains + data.test:
        batch = fetch_all(source)
        assert list(batch) == ["image"] and batch["image"].shape[1:] == (channels, 8, 8)
        assert batch["image"].dtype == torch.float32 and batch["image"].abs().max() <= 1


def test_held_out_files_are_resized_and_nothing_else(tmp_path):
    fill(tmp_path / "trainA")
    fill(tmp_path / "trainB")
    fill(tmp_path / "testA")
    data = folder("folder_pair", tmp_path)
    assert torch.equal(fetch_all(data.test[1])["image"], fetch_all(data.test[0])["image"])
    paths = sorted((tmp_path / "testA").rglob("*.*"))
    for path, tensor in zip(paths, fetch_all(data.test[0])["image"], strict=True):
        if path.name.startswith(("deep", "rgba")):
            continue
        expected = Image.open(path).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC)
        assert levels_off(tensor[None], np.array(expected)) < 0.01
    assert torch.equal(fetch_all(data.test[0])["image"], fetch_all(data.test[0])["image"])


@pytest.mark.parametrize("flip", [True, False])
def test_training_files_are_cropped_and_mirrored(tmp_path, flip):
    """Of a 12-pixel file every 8-pixel crop occurs, half of them mirrored where asked."""
    fill(tmp_path / "a", {"x.png": KINDS["rgb.png"]})
    data = folder("image_folder", tmp_path, flip=flip)
    images = data.domains[0].fetch([0] * 400, generator())["image"]
    images = ((images + 1) * 127.5).round().byte().numpy()
    crops = {}
    for mirrored in (False, True):
        picture = RGB[:, ::-1] if mirrored else RGB
        for top in range(5):
            for left in range(5):
                crop = picture[top : top + 8, left : left + 8].transpose(2, 0, 1)
                crops[crop.tobytes()] = (mirrored, top, left)
    seen = [crops[image.tobytes()] for image in images]
    assert len({place[1:] for place in seen}) == 25
    assert 150 < sum(place[0] for place in seen) < 250 if flip else not any(p[0] for p in seen)
    still = data.test[0].fetch([0] * 20, generator())["image"]
    expected = Image.fromarray(RGB).resize((8, 8), Image.Resampling.BICUBIC)
    assert all(levels_off(x[None], np.array(expected)) < 0.01 for x in still)


def test_training_files_are_resized_to_load_size(tmp_path):
    fill(tmp_path / "a", {"x.png": KINDS["photo.JPG"]})
    source = folder("image_folder", tmp_path, size=10, load_size=10, flip=False).domains[0]
    expected = KINDS["photo.JPG"].resize((10, 10), Image.Resampling.BICUBIC)
    assert levels_off(source.fetch([0], generator())["image"], np.array(expected)) < 0.01


def test_image_folder_numbers_classes_by_name(tmp_path):
    fill(tmp_path / "zebra", {"1.png": KINDS["rgb.png"], "deep/2.png": KINDS["rgb.png"]})
    fill(tmp_path / "ape", {"b.png": KINDS["rgb.png"]})
    fill(tmp_path / ".cache", {"b.png": KINDS["rgb.png"]})
    fill(tmp_path, {"stray.png": KINDS["rgb.png"]})
    data = folder("image_folder", tmp_path)
    assert data.num_classes == 2 and fetch_all(data.test[0])["label"].tolist() == [0, 1, 1]
    assert data.class_names == ["ape", "zebra"]
    batch = data.domains[0].fetch([2, 0], generator())
    assert batch["label"].tolist() == [1, 0] and batch["label"].dtype == torch.int64


def refusal(call) -> str:
    with pytest.raises(RequestError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    return message


def test_missing_and_empty_folders_are_refused_by_name(tmp_path):
    for name in ("folder_pair", "image_folder"):
        assert str(tmp_path / "gone") in refusal(lambda n=name: folder(n, tmp_path / "gone"))
        (tmp_path / "file").touch()
        assert str(tmp_path / "file") in refusal(lambda n=name: folder(n, tmp_path / "file"))
        message = refusal(lambda n=name: folder(n, tmp_path, size=16))
        assert "load_size=12" in message and "image_size=16" in message
    assert str(tmp_path) in refusal(lambda: folder("image_folder", tmp_path))
    message = refusal(lambda: folder("folder_pair", tmp_path))
    assert str(tmp_path) in message and "trainA" in message and "trainB" in message
    fill(tmp_path / "trainA")
    message = refusal(lambda: folder("folder_pair", tmp_path))
    assert "no folder trainB" in message and "no folder trainA" not in message
    for name in ("trainB", "testB"):
        (tmp_path / name).mkdir()
        assert str(tmp_path / name) in refusal(lambda: folder("folder_pair", tmp_path))
        assert str(tmp_path / "t") in refusal(lambda: folder("image_folder", tmp_path))
        fill(tmp_path / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_is_refused_by_name(tmp_path, workers):
    fill(tmp_path / "a")
    broken = tmp_path / "a" / "broken.png"
    whole = (tmp_path / "a" / "rgb.png").read_bytes()
    broken.write_bytes(whole)
    data = folder("image_folder", tmp_path)
    broken.write_bytes(whole[:200])  # behind the check
    message = refusal(lambda: stream(data.domains, 0, 4, workers=workers))
    assert str(broken) in message
    assert str(broken) in refusal(lambda: fetch_all(data.test[0]))
