"""Distances of feature sets: equal to torchmetrics' and torch-fidelity's, and the right way up."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from gannorm.metrics.distances import (
    fid,
    inception_score,
    kid,
    neighbourhoods,
    precision_recall_curve,
)


def sets(n: int, m: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two correlated, shifted sets of features, float32."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g) / d**0.5
    real = torch.randn(n, d, generator=g) @ mix + 1
    fake = 1.2 * torch.randn(m, d, generator=g) @ mix + 0.8
    return real, fake


class Itself(nn.Module):
    """Stands where torchmetrics has its Inception: the images are the features."""

    num_features = 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


# ---- equal to others'


@pytest.mark.parametrize("n,m,d", [(400, 300, 16), (1000, 1000, 64), (90, 400, 64)])
def test_fid_equals_torchmetrics(n, m, d):
    real, fake = (x.double() for x in sets(n, m, d))
    theirs = _compute_fid(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov())
    assert fid(real, fake) == pytest.approx(float(theirs), abs=1e-4)


def test_fid_of_fewer_samples_than_features_is_exact():
    """Where a root of the product of singular covariances is at its worst: padded with zeros,
    the same sets have the same distance."""
    real, fake = sets(40, 30, 100)
    wide = [torch.cat([x, torch.zeros(len(x), 60)], 1) for x in (real, fake)]
    assert fid(*wide) == pytest.approx(fid(real, fake), rel=1e-9)
    assert fid(real, real) == pytest.approx(0, abs=1e-9)


def test_fid_of_two_normals_in_closed_form():
    """Diagonal covariances: |m - m'|^2 + sum (s - s')^2, of samples whitened exactly."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(500, 4, generator=g, dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    s, t = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 1.0, 0.5])
    shift = torch.tensor([1.0, 0.0, -2.0, 0.0])
    expected = float(shift.square().sum() + (s - t).square().sum())
    assert fid(white * s, white * t + shift) == pytest.approx(expected, rel=1e-9)


def test_kid_equals_torchmetrics_and_torch_fidelity():
    real, fake = sets(300, 300, 8)
    theirs = KernelInceptionDistance(Itself(), subsets=1, subset_size=300)
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True), theirs.update(fake, real=False)
    ours = kid(real, fake, subsets=1, size=300)
    assert ours == pytest.approx(float(theirs.compute()[0]), abs=1e-4)
    fidelity = kid_features_to_metric(
        real.double(), fake.double(), kid_subsets=1, kid_subset_size=300, rng_seed=0,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1, verbose=False,
    )  # fmt: skip
    assert ours == pytest.approx(fidelity["kernel_inception_distance_mean"], abs=1e-8)


def test_kid_is_unbiased_and_reproducible():
    """Of two sets of one distribution its mean is 0, with 50 samples as with 500."""
    for n in (50, 500):
        values = [kid(*(x for x in torch.randn(2, n, 8, generator=gen(s)))) for s in range(60)]
        spread = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values)) < 3 * spread
    real, fake = sets(200, 150, 8)
    assert kid(real, fake, size=50) == kid(real, fake, size=50)
    assert kid(real, fake, size=50) != kid(real, fake, size=50, seed=1)
    assert kid(real, fake, size=10**6) == kid(real, fake, size=150)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_inception_score_equals_torchmetrics_and_torch_fidelity():
    logits = 3 * torch.randn(400, 8, generator=gen(0))
    theirs = InceptionScore(Itself(), splits=1)
    theirs.update(logits)
    assert inception_score(logits, 1) == pytest.approx(float(theirs.compute()[0]), abs=1e-4)
    for splits in (1, 4, 10):
        fidelity = isc_features_to_metric(logits, splits, shuffle=False)
        assert inception_score(logits, splits) == pytest.approx(
            fidelity["inception_score_mean"], abs=1e-8
        )


def test_inception_score_has_its_known_values():
    sure = 100 * torch.eye(10).repeat(20, 1)
    assert inception_score(sure, 1) == pytest.approx(10)  # certain, all classes
    assert inception_score(sure[:1].repeat(50, 1), 1) == pytest.approx(1)  # one class
    assert inception_score(torch.zeros(50, 10), 1) == pytest.approx(1)  # never certain
    assert inception_score(sure[:3]) == pytest.approx(3)  # fewer than the splits


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_equal_torch_fidelity(k):
    real, fake = (x.double() for x in sets(500, 500, 16))
    ours = neighbourhoods(real, fake, k)
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=k, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    assert 0.1 < ours["precision"] < 1 and 0.1 < ours["recall"] < 1
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-4)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-4)


def test_density_and_coverage_by_their_definitions(monkeypatch):
    monkeypatch.setattr("gannorm.metrics.distances.ROWS", 7)
    real, fake = sets(40, 40, 3)
    k = 4

    def distance(a, b):
        return math.dist(a.tolist(), b.tolist())

    radii = [sorted(distance(x, y) for y in real)[k] for x in real]  # itself comes first
    inside = [[distance(x, y) <= r for y in fake] for x, r in zip(real, radii, strict=True)]
    density = sum(map(sum, inside)) / (k * len(fake))
    coverage = sum(any(row) for row in inside) / len(real)
    figures = neighbourhoods(real, fake, k)
    assert figures["density"] == pytest.approx(density)
    assert figures["coverage"] == pytest.approx(coverage)


def test_as_many_of_each_set_are_taken():
    real, fake = sets(400, 100, 8)
    taken = neighbourhoods(real[::4], fake)
    assert neighbourhoods(real, fake) == taken
    assert neighbourhoods(real[::4], fake.repeat_interleave(3, 0)) == taken


# ---- what has no value


def test_too_few_samples_are_refused():
    real, fake = sets(10, 10, 4)
    with pytest.raises(ValueError, match="fake has less"):
        fid(real, fake[:1])
    with pytest.raises(ValueError, match="two samples"):
        kid(real[:1], fake)
    with pytest.raises(ValueError, match="more than 5 samples"):
        neighbourhoods(real, fake[:5])


def test_samples_that_are_not_finite_have_no_fid():
    real, fake = sets(20, 20, 4)
    fake[3, 2] = float("inf")
    assert math.isnan(fid(real, fake))
    figures = neighbourhoods(real, torch.full_like(fake, float("nan")))
    assert figures["precision"] == figures["coverage"] == 0


# ---- the right way: a mixture of ten clusters stands for ten classes


def clusters(n: int, seed: int, classes: range = range(10)) -> torch.Tensor:
    g = gen(seed)
    centers = 4 * torch.randn(10, 16, generator=gen(99))
    labels = torch.tensor([classes[i % len(classes)] for i in range(n)])
    return centers[labels] + torch.randn(n, 16, generator=g)


def figures(fake: torch.Tensor) -> dict[str, float]:
    real = clusters(600, 0)
    return {"fid": fid(real, fake), "kid": kid(real, fake), **neighbourhoods(real, fake)}


def test_each_fault_raises_the_right_figure():
    good = clusters(600, 1)
    real = figures(good)
    noisy = figures(good + torch.randn(600, 16, generator=gen(2)))
    dropped = figures(clusters(600, 1, range(7)))
    duplicated = figures(good[:30].repeat(20, 1))
    for worse in (noisy, dropped, duplicated):
        assert worse["fid"] > 2 * real["fid"] and worse["kid"] > real["kid"]
    # Noise: samples leave the real ones' balls. Dropped classes: none does, but a third of the
    # real ones is covered by no sample. Duplicates: each is a good sample; there are few.
    assert noisy["precision"] < real["precision"] - 0.3 and noisy["density"] < real["density"] / 2
    assert dropped["precision"] > real["precision"] - 0.05
    assert dropped["coverage"] == pytest.approx(0.7 * real["coverage"], abs=0.05)
    assert dropped["recall"] < real["recall"] - 0.15
    assert duplicated["precision"] > real["precision"] - 0.1
    assert duplicated["coverage"] < real["coverage"] / 2
    assert duplicated["recall"] < real["recall"] / 2


def test_more_of_a_fault_is_further():
    good = clusters(600, 1)
    noise = torch.randn(600, 16, generator=gen(2))
    found = [figures(good + s * noise) for s in (0, 0.5, 1, 2)]
    for name, sign in (("fid", 1), ("kid", 1), ("precision", -1), ("coverage", -1)):
        values = [sign * f[name] for f in found]
        assert values == sorted(values) and values[0] < values[-1], name


# ---- the precision-recall curve


def test_the_curve_shows_what_is_missing_and_what_is_too_much():
    """Ten far clusters: of the generated samples half are real, of the real ones all or half are
    generated; the corner of Sajjadi et al.'s figure."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) // 100
    real = 100 * torch.eye(10)[labels] + torch.randn(1000, 10, generator=g)
    fake = 100 * torch.eye(10)[labels] + torch.randn(1000, 10, generator=g)
    strange = fake - 300

    def corner(samples):
        precision, recall = precision_recall_curve(real, samples)
        assert (precision.diff() >= -1e-9).all() and (recall.diff() <= 1e-9).all()
        return float(precision.max()), float(recall.max())

    assert corner(fake) == pytest.approx((1, 1), abs=0.02)
    assert corner(fake[labels < 5]) == pytest.approx((1, 0.5), abs=0.02)
    assert corner(torch.cat([fake[0::2], strange[0::2]])) == pytest.approx((0.5, 1), abs=0.02)
    assert corner(strange) == (0, 0)
    assert torch.equal(*(precision_recall_curve(real, fake)[0] for _ in range(2)))
