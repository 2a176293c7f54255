"""CIFAR-10 and MNIST on torchvision's true file layouts, absent ones and damaged ones."""

import gzip
import hashlib
import pickle
import struct
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from gannorm.data import build_data, fetch_all
from gannorm.errors import RequestError
from gannorm.schema import TorchvisionConfig


def torchvision(name, root, size, channels, flip=False, download=False):
    return build_data(
        TorchvisionConfig(
            name=name,
            image_size=size,
            channels=channels,
            batch_size=2,
            num_workers=0,
            root=str(root),
            download=download,
            flip=flip,
        )
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def refusal(call) -> str:
    with pytest.raises(RequestError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    return message


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
LABELS = [3, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def resized(arrays: np.ndarray, size: int) -> np.ndarray:
    """As Pillow does it."""
    images = [Image.fromarray(np.ascontiguousarray(a)) for a in arrays]
    return np.stack([np.array(i.resize((size, size), Image.Resampling.BILINEAR)) for i in images])


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Twelve images in CIFAR-10's six files: two in each, the last two held out."""
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()

    def write(name: str, content: dict) -> list[str]:
        body = pickle.dumps(content)
        (root / name).write_bytes(body)
        return [name, hashlib.md5(body).hexdigest()]

    lists = []
    for k, (name, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list):
        part = PIXELS[2 * k : 2 * k + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        lists.append(write(name, {"data": part, "labels": LABELS[2 * k : 2 * k + 2]}))
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", lists[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", lists[5:])
    changed = {**datasets.CIFAR10.meta, "md5": meta[1]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", changed)
    return tmp_path


def test_cifar10(cifar10):
    data = torchvision("cifar10", cifar10, 32, 3)
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    train, test = check_images(data.domains[0], 32, 3, 10), check_images(data.test[0], 32, 3, 2)
    torch.testing.assert_close(torch.cat([train["image"], test["image"]]), expected)
    assert train["label"].tolist() + test["label"].tolist() == LABELS and data.num_classes == 10
    assert data.class_names == list("abcdefghij")
    small = fetch_all(torchvision("cifar10", cifar10, 16, 3).test[0])["image"]
    assert levels_off(small, resized(PIXELS[10:], 16)) <= 2
    grey = fetch_all(torchvision("cifar10", cifar10, 32, 1).test[0])["image"]
    assert (grey - expected[10:].mean(1, keepdim=True)).abs().max() <= 1 / 127.5


def test_torchvision_training_images_are_mirrored(cifar10):
    data = torchvision("cifar10", cifar10, 32, 3, flip=True)
    plain = torchvision("cifar10", cifar10, 32, 3)
    still = fetch_all(plain.domains[0])["image"][0]
    images = data.domains[0].fetch([0] * 200, generator())["image"]
    mirrored = [torch.equal(x, still.flip(-1)) for x in images]
    assert all(m or torch.equal(x, still) for m, x in zip(mirrored, images, strict=True))
    assert 70 < sum(mirrored) < 130
    held_out = fetch_all(plain.test[0])["image"]
    for seed in range(5):
        assert torch.equal(data.test[0].fetch([0, 1], generator(seed))["image"], held_out)


def idx(array: np.ndarray) -> bytes:
    """MNIST's file format."""
    header = struct.pack(">HBB", 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = PIXELS[:, :28, :28, 0], np.array(LABELS, np.uint8)
    for name, part in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(images[part]))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[part]))
    return tmp_path


def test_mnist(mnist):
    data = torchvision("mnist", mnist, 28, 1)
    train, test = check_images(data.domains[0], 28, 1, 8), check_images(data.test[0], 28, 1, 4)
    expected = torch.from_numpy(PIXELS[:, :28, :28, 0].copy())[:, None] / 127.5 - 1
    torch.testing.assert_close(torch.cat([train["image"], test["image"]]), expected)
    assert train["label"].tolist() + test["label"].tolist() == LABELS and data.num_classes == 10
    assert data.class_names == [str(k) for k in range(10)]
    larger = fetch_all(torchvision("mnist", mnist, 32, 3).test[0])["image"]
    assert larger.shape == (4, 3, 32, 32) and (larger == larger[:, :1]).all()
    assert levels_off(larger[:, :1], resized(PIXELS[8:, :28, :28, 0], 32)) <= 2


@pytest.mark.parametrize("cut", [0, 3, 7, 15])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_truncated_mnist_is_refused_by_name(mnist, name, cut):
    """torchvision checks the packed files, not the unpacked ones."""
    path = mnist / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[: min(cut, path.stat().st_size - 1)])
    assert str(mnist) in refusal(lambda: torchvision("mnist", mnist, 28, 1))


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_absent_set_is_refused_with_a_way_out(tmp_path, monkeypatch, name, capsys):
    """Not to be downloaded, and a download that fails: every proxy here is a closed door."""
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    for download in (False, True):
        message = refusal(lambda d=download: torchvision(name, tmp_path, 32, 3, download=d))
        assert f"data={name}" in message and str(tmp_path) in message
        assert "data=digits" in message and "data.root" in message
        assert ":)" not in message  # a reason, not the beginning of one
    assert capsys.readouterr().out == ""


def test_damaged_cifar10_is_refused(cifar10):
    path = cifar10 / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    assert "data=digits" in refusal(lambda: torchvision("cifar10", cifar10, 32, 3))


def test_packed_mnist_is_unpacked(mnist, monkeypatch):
    """Files that were fetched by hand, still packed."""
    raw = mnist / "MNIST" / "raw"
    resources = []
    for name, _ in datasets.MNIST.resources:
        body = gzip.compress((raw / name.removesuffix(".gz")).read_bytes())
        (raw / name.removesuffix(".gz")).unlink()
        (raw / name).write_bytes(body)
        resources.append((name, hashlib.md5(body).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert len(torchvision("mnist", mnist, 28, 1, download=True).domains[0]) == 8
