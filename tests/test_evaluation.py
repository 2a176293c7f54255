"""References: real against real is the floor, faults raise the right figure, caches are honest."""

import os
from pathlib import Path

import pytest
import torch
from digit_data import digit_data
from standin import inception_weights

from gannorm.data import build_data, fetch_all
from gannorm.data.digits import _Tensors
from gannorm.metrics import evaluation
from gannorm.metrics.distances import fid
from gannorm.metrics.evaluation import ReferenceSet, build_references, evenly
from gannorm.metrics.features import FEATURES, Turns, shrunk
from gannorm.metrics.observations import Observations
from gannorm.schema import DigitsConfig, MetricsConfig

CPU = torch.device("cpu")
CACHE = Path(os.environ["GANNORM_CACHE"])


def config(**changes) -> MetricsConfig:
    values = {
        "extractor": "embedded", "weights": None, "samples": None,
        "standing_batches": 0, "best": "fid", "patience": None, "cache": str(CACHE),
    }  # fmt: skip
    return MetricsConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def data():
    return digit_data()


@pytest.fixture(scope="module")
def reference(data) -> ReferenceSet:
    return build_references(config(), data, CPU)[0]


@pytest.fixture(scope="module")
def held_out(data):
    return fetch_all(data.test[0])


def figures(reference: ReferenceSet, images, labels) -> dict[str, float]:
    seen = reference.observe(images, labels)
    return reference.compare(seen) | reference.compare_classes(seen)


def test_each_fault_raises_the_right_figure(reference, held_out):
    """Held-out real digits lowest; then what a generator may do wrong, done to them."""
    images, labels = held_out["image"], held_out["label"]
    real = figures(reference, images, labels)
    g = torch.Generator().manual_seed(0)
    noisy = figures(reference, images + 0.5 * torch.randn(images.shape, generator=g), labels)
    kept = labels < 7
    dropped = figures(reference, images[kept], labels[kept])
    index = torch.arange(360) % 30
    duplicated = figures(reference, images[index], labels[index])
    swapped = figures(reference, images, labels[torch.randperm(360, generator=g)])
    assert real["accuracy"] > 0.95 and real["coverage"] > 0.9
    for worse in (noisy, dropped, duplicated):
        assert worse["fid"] > 2 * real["fid"] and worse["kid"] > real["kid"] + 0.1
    assert noisy["precision"] < real["precision"] - 0.2 and noisy["accuracy"] < real["accuracy"]
    assert dropped["coverage"] < real["coverage"] - 0.15 and dropped["accuracy"] > 0.95
    assert dropped["inception_score"] < real["inception_score"] - 0.5
    assert duplicated["coverage"] < 0.5 and duplicated["precision"] > real["precision"] - 0.15
    # Swapped labels change nothing but what is read and each class's own distance.
    assert all(swapped[k] == real[k] for k in ("fid", "kid", "precision", "coverage"))
    assert swapped["accuracy"] < 0.2 and swapped["class_fid"] > 5 * real["class_fid"]


def test_the_floor_is_of_the_held_out_images(reference, held_out):
    seen = reference.observe(held_out["image"], held_out["label"])
    assert reference.compare(reference.held_out) == pytest.approx(reference.compare(seen))
    assert reference.count == 360 and len(reference.real) == 1437
    assert reference.protocol()["floor"] == "360 held-out images"
    assert reference.protocol()["real"] == "1437 training images"


def test_classes_are_compared_with_their_own(reference, held_out):
    seen = reference.observe(held_out["image"], held_out["label"])
    found = reference.compare_classes(seen)
    own = fid(reference.real.features[reference.real.labels == 3], seen.features[seen.labels == 3])
    assert found["class_fid/3"] == own
    every = [found[f"class_fid/{k}"] for k in range(10)]
    assert found["class_fid"] == pytest.approx(sum(every) / 10)
    weights = torch.bincount(held_out["label"]) / 360
    accuracy = sum(found[f"class_accuracy/{k}"] * float(weights[k]) for k in range(10))
    assert accuracy == pytest.approx(reference.compare(seen)["accuracy"])
    alone = seen[:1]
    assert set(reference.compare_classes(alone)) == {f"class_accuracy/{int(alone.labels[0])}"}


def test_too_few_samples_have_no_distances(reference, held_out):
    seen = reference.observe(held_out["image"][:5], held_out["label"][:5])
    assert set(reference.compare(seen)) == {"accuracy"}


def test_samples_set_the_counts(data):
    fewer = build_references(config(samples=100), data, CPU)[0]
    assert fewer.count == len(fewer.held_out) == 100
    more = build_references(config(samples=1000), data, CPU)[0]
    assert more.count == 1000 and len(more.held_out) == 360


def test_without_held_out_images_the_training_ones_are_split(data, reference):
    source = data.real[0]
    halves = ReferenceSet(source, source, reference.extractor, reference.reader, CPU, CACHE)
    assert len(halves.real) == 719 and len(halves.held_out) == halves.count == 718
    assert halves.compare(halves.held_out)["fid"] > 0.1
    assert halves.protocol()["floor"] == "718 every other training image"


def test_unlabelled_images_are_judged_by_quarter_turns(data):
    data = digit_data()
    data.num_classes = None
    (reference,) = build_references(config(), data, CPU)
    assert "quarter turns" in reference.protocol()["extractor"]
    real = reference.compare(reference.held_out)
    assert not {"accuracy", "inception_score", "class_fid"} & real.keys()
    turned = reference.compare(reference.observe(data.test[0].images.rot90(1, (2, 3))))
    noise = reference.compare(reference.observe(torch.rand_like(data.test[0].images) * 2 - 1))
    assert 3 * real["fid"] < min(turned["fid"], noise["fid"])
    (again,) = build_references(config(), data, CPU)
    assert torch.equal(again.real.features, reference.real.features)


@pytest.mark.parametrize("size", [(40, 40), (130, 64), (70, 150)])
def test_images_are_shrunk_for_quarter_turns(size):
    small = shrunk(torch.rand(2, 3, *size))
    assert min(small.shape[-2:]) == min(64, *size)
    assert abs(small.shape[-2] / small.shape[-1] - size[0] / size[1]) < 0.03
    features, turns = Turns(3)(torch.rand(2, 3, *size))
    assert features.shape == (2, FEATURES) and turns.shape == (2, 4)


def test_what_was_seen_is_kept_by_content(data, reference, monkeypatch, tmp_path):
    images, labels = data.real[0].images[:40], data.real[0].labels[:40]
    source, made = _Tensors(images, labels), []
    fetch = _Tensors.fetch

    def counted(self, index, generator):
        made.append(len(index))
        return fetch(self, index, generator)

    monkeypatch.setattr(_Tensors, "fetch", counted)

    def reference_of(source) -> ReferenceSet:
        return ReferenceSet(source, source, reference.extractor, reference.reader, CPU, tmp_path)

    first = reference_of(source)
    assert made == [40]
    again = reference_of(_Tensors(images.clone(), labels.clone()))
    assert made == [40] and torch.equal(again.real.features, first.real.features)
    assert torch.equal(again.real.labels, first.real.labels)
    reference_of(_Tensors(images + 0.1, labels))
    assert made == [40, 40]
    monkeypatch.setattr(evaluation, "MOST_REAL", 10)
    assert len(reference_of(source).real) == 5 and made == [40, 40, 10]


def test_inception_beside_a_reader(data, monkeypatch):
    """Distances by the one, classes by the other."""

    class Stand(torch.nn.Module):
        protocol, names_kinds = "a stand-in", True

        def __init__(self, weights):
            super().__init__()
            self.register_buffer("bias", torch.tensor(float(weights)))

        def identity(self):
            return "x" * 8

        def forward(self, images):
            return images.flatten(1)[:, ::50] + self.bias, images.flatten(1)[:, :5]

    monkeypatch.setattr(evaluation, "Inception", Stand)
    both = build_references(config(extractor="inception", weights="0.5"), data, CPU)[0]
    real = both.compare(both.held_out)
    assert real["accuracy"] > 0.95 and both.protocol()["extractor"] == "a stand-in"
    assert both.real.features.shape[1] == 21


def test_unlabelled_images_are_measured_by_inception(data, held_out, tmp_path):
    """The real thing, from a weights file to the figures; 2048 features of 14 images."""
    few = digit_data()
    for sources in (few.domains, few.real):
        sources[0] = _Tensors(data.real[0].images[:7], data.real[0].labels[:7])
    few.test[0] = _Tensors(held_out["image"][:7], held_out["label"][:7])
    few.num_classes = None
    weights = str(inception_weights(tmp_path / "w.pth"))
    cfg = config(extractor="inception", weights=weights, cache=str(tmp_path))
    (reference,) = build_references(cfg, few, CPU)
    assert reference.real.features.shape == (7, 2048) and reference.reader is None
    found = reference.compare(reference.held_out)
    assert set(found) == {
        "fid", "kid", "inception_score", "precision", "recall", "density", "coverage",
    }  # fmt: skip
    assert found["fid"] > 0 and reference.compare(reference.real)["fid"] < 1e-6 * found["fid"]
    assert len(list(tmp_path.glob("features-*.pt"))) == 2


def test_evenly():
    assert evenly(10, 10).tolist() == list(range(10))
    assert evenly(10, 4).tolist() == [0, 2, 5, 7] and evenly(3, 0).tolist() == []


def test_seen():
    a = Observations(torch.zeros(2, 3), torch.zeros(2, 4), None, torch.tensor([1, 2]))
    both = Observations.joined([a, a[1:]])
    assert len(both) == 3 and both.predicted is None and both.labels.tolist() == [1, 2, 2]


@pytest.mark.parametrize("name", ["digits", "digits_m", "nothing held out"])
def test_the_nearest_image_to_a_training_image_is_itself(name, monkeypatch):
    """Even where a patch of a photograph is drawn behind each digit."""
    cfg = DigitsConfig(
        name="digits_m" if name == "digits_m" else "digits",
        image_size=32,
        channels=1,
        batch_size=32,
        num_workers=0,
    )
    data = build_data(cfg)
    if name == "nothing held out":
        data.test = data.real
    monkeypatch.setattr("gannorm.metrics.features.STEPS", 2)
    reference = build_references(config(), data, CPU)[-1]
    chosen = torch.tensor([3, 200, 500])
    found = reference.nearest(reference.real.features[chosen], 4)
    assert found.shape == (3, 4, 1, 32, 32)
    again = reference.observe(found.flatten(0, 1)).features.view(3, 4, -1)
    torch.testing.assert_close(again[:, 0], reference.real.features[chosen])
    apart = (again - again[:, :1]).norm(dim=2)
    assert (apart.diff(dim=1) >= -1e-4).all() and (apart[:, 1] > 0).all()
