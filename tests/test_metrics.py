"""The digit reader: reproducible, good at its task, and worse on worse samples."""

import pytest
import torch

from gannorm import metrics
from gannorm.config import DigitsConfig
from gannorm.data import build_data, fetch_all
from gannorm.metrics import in_chunks, read_accuracy, train_classifier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return build_data(DigitsConfig("digits", 32, 1, 32, 0))


@pytest.fixture(scope="module")
def classifier(data):
    return train_classifier(data.domains[0], 10, CPU)


@pytest.fixture(scope="module")
def held_out(data):
    batch = fetch_all(data.test[0])
    return batch["image"], batch["label"]


def test_held_out_digits_are_read(classifier, held_out):
    assert read_accuracy(classifier, *held_out) > 0.95
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())


def test_accuracy_is_the_share_read_right(classifier, held_out):
    images, labels = held_out
    right = [int(classifier(x[None]).argmax()) == int(y) for x, y in zip(*held_out, strict=True)]
    assert read_accuracy(classifier, images, labels) == pytest.approx(sum(right) / len(right))
    assert read_accuracy(classifier, images, (labels + 1) % 10) < 0.05
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert 0.03 < read_accuracy(classifier, images, shuffled) < 0.17


def test_worse_samples_read_worse(classifier, held_out):
    images, labels = held_out
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    figures = [read_accuracy(classifier, images + s * noise, labels) for s in (0.0, 1.0, 5.0)]
    assert figures == sorted(figures, reverse=True) and figures[0] > figures[-1] + 0.6
    assert read_accuracy(classifier, torch.full_like(images, -1), labels) < 0.2


def test_shifted_digits_are_still_read(classifier, held_out):
    """It was trained on shifts of up to an eighth."""
    images, labels = held_out
    assert read_accuracy(classifier, images.roll((3, -3), (2, 3)), labels) > 0.85


def test_same_seed_same_classifier_and_no_trace(data, monkeypatch):
    monkeypatch.setattr(metrics, "STEPS", 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_classifier(data.domains[0], 10, CPU, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = train_classifier(data.domains[0], 10, CPU, seed=1).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    other = train_classifier(data.domains[0], 10, CPU, seed=2).state_dict()
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize("size", [1, 3, 7, 128])
def test_in_chunks_equals_the_whole(size):
    x, y = torch.randn(7, 2), torch.arange(7)
    seen = []

    def function(a, b):
        seen.append(len(a))
        return a * b[:, None]

    assert torch.equal(in_chunks(function, x, y, size=size), x * y[:, None])
    assert sum(seen) == 7 and max(seen) <= size
