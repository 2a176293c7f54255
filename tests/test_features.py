"""The extractors: reproducible, good at their task, kept on disk by what they were made of."""

import os
from pathlib import Path

import pytest
import torch
from digit_data import digit_data
from standin import inception_weights
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from gannorm.data import fetch_all
from gannorm.errors import RequestError
from gannorm.metrics import features
from gannorm.metrics.features import FEATURES, Inception, cached, embedded, train_embedded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return digit_data()


@pytest.fixture(scope="module")
def net(data):
    return embedded(data.domains[0], 10, CPU, Path(os.environ["GANNORM_CACHE"]))


@pytest.fixture(scope="module")
def held_out(data):
    batch = fetch_all(data.test[0])
    return batch["image"], batch["label"]


def accuracy(net, images, labels) -> float:
    return float((net(images)[1].argmax(1) == labels).float().mean())


# ---- embedded


def test_held_out_digits_are_read(net, held_out):
    images, labels = held_out
    assert accuracy(net, images, labels) > 0.95
    assert accuracy(net, images.roll((3, -3), (2, 3)), labels) > 0.85  # it was trained on shifts
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    figures = [accuracy(net, images + s * noise, labels) for s in (0.0, 1.0, 5.0)]
    assert figures == sorted(figures, reverse=True) and figures[0] > figures[-1] + 0.6
    assert accuracy(net, torch.full_like(images, -1), labels) < 0.2


def test_the_features_are_the_layer_before_the_logits(net, held_out):
    images = held_out[0][:5]
    seen, logits = net(images)
    assert seen.shape == (5, FEATURES) and logits.shape == (5, 10)
    assert torch.equal(net.head(seen), logits)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    maps = net.maps(images)
    assert [tuple(m.shape) for m in maps] == [(5, 32, 16, 16), (5, 64, 8, 8), (5, 96, 4, 4)]


def test_same_seed_same_classifier_and_no_trace(data, monkeypatch):
    monkeypatch.setattr(features, "STEPS", 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_embedded(data.domains[0], 10, CPU, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = train_embedded(data.domains[0], 10, CPU, seed=1)
    assert first.identity() == again.identity()
    other = train_embedded(data.domains[0], 10, CPU, seed=2)
    assert first.identity() != other.identity()


def test_it_is_trained_once_for_each_content_and_recipe(data, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "STEPS", 1)
    made = []
    train = features.train_embedded

    def counted(*args):
        made.append(1)
        return train(*args)

    counted.__wrapped__ = train  # its source is part of the recipe
    monkeypatch.setattr(features, "train_embedded", counted)
    source = data.domains[0]
    first = embedded(source, 10, CPU, tmp_path)
    assert embedded(source, 10, CPU, tmp_path).identity() == first.identity() and len(made) == 1
    x = torch.zeros(1, 1, 32, 32)
    assert torch.equal(embedded(source, 10, CPU, tmp_path)(x)[0], first(x)[0])
    embedded(data.test[0], 10, CPU, tmp_path)  # other images
    monkeypatch.setattr(features, "STEPS", 2)
    embedded(source, 10, CPU, tmp_path)
    embedded(source, 11, CPU, tmp_path)
    assert len(made) == 4 and len(list(tmp_path.iterdir())) == 4


def test_cached(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": torch.arange(3)}

    folder = tmp_path / "a" / "b"
    for expected in (1, 1):
        assert torch.equal(cached(folder, "one", make)["x"], torch.arange(3))
        assert len(calls) == expected
    (folder / "one.pt").write_bytes(b"damaged")
    assert cached(folder, "one", make)["x"].tolist() == [0, 1, 2] and len(calls) == 2
    assert cached(folder, "one", make)["x"].tolist() == [0, 1, 2] and len(calls) == 2
    flipped = bytearray((folder / "one.pt").read_bytes())
    flipped[flipped.index(torch.arange(3).numpy().tobytes())] ^= 1  # which torch does not see
    (folder / "one.pt").write_bytes(flipped)
    assert cached(folder, "one", make)["x"].tolist() == [0, 1, 2] and len(calls) == 3
    assert [p.name for p in folder.iterdir()] == ["one.pt"]
    (tmp_path / "file").touch()
    assert cached(tmp_path / "file", "one", make)["x"].tolist() == [0, 1, 2]  # not a folder
    assert len(calls) == 4


# ---- inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return inception_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_the_stand_in_has_the_true_layout(weights):
    """FID's: 1008 logits, 94 convolutions with their norms, the last block's pooled branch."""
    state = torch.load(weights, weights_only=True)
    assert state["fc.weight"].shape == (1008, 2048)
    assert sum(k.endswith("conv.weight") for k in state) == 94
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)


def test_inception_equals_torch_fidelity(weights, held_out):
    images = held_out[0][:3]
    net = Inception(str(weights)).eval()
    seen, logits = net(images)
    assert seen.shape == (3, 2048) and logits.shape == (3, 1008)
    assert seen.std() > 0 and logits.std() > 0
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    grey = ((images + 1) * 127.5).round().to(torch.uint8).repeat(1, 3, 1, 1)
    for ours, expected in zip((seen, logits), theirs(grey), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert "299x299" in net.protocol and "2048" in net.protocol
    assert net.identity() == Inception(str(weights)).identity()


@pytest.mark.parametrize("content", [None, b"no weights", {"fc.weight": torch.zeros(3)}])
def test_other_weights_are_refused(content, tmp_path):
    path = tmp_path / "w.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="metrics.weights=.*w.pth.*metrics.extractor=embedded"):
        Inception(str(path))


def test_weights_that_run_code_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"fc.weight": Harm()}, tmp_path / "w.pth")
    with pytest.raises(RequestError, match="w.pth"):
        Inception(str(tmp_path / "w.pth"))
    assert not (tmp_path / "harm").exists()


def test_without_a_download_the_way_out_is_named(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline
    )
    with pytest.raises(RequestError, match="download.*no route.*metrics.weights="):
        Inception(None)


def test_without_torch_fidelity_its_name_is_said(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None
    )
    with pytest.raises(RequestError, match="pip install torch-fidelity"):
        Inception(None)
