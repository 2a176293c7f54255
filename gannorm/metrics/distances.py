"""Distances between two sets of features, real (N, D) and generated (M, D); all in float64."""

import math

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

NEIGHBOURS = 5  # of precision, recall, density and coverage
KID_SUBSETS, KID_SIZE = 10, 1000
IS_SPLITS = 10
LARGEST = 10_000  # samples of each side among which neighbours are looked for
ROWS = 1024  # of the matrix of distances, at a time
PRD_CLUSTERS, PRD_RUNS, PRD_SLOPES = 20, 5, 101


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of the normal distributions with the sets' moments (Heusel et al., 2017).

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), both covariances unbiased. With C = A^T A and
    C' = B^T B the last trace is the sum of the singular values of A B^T: no root of a product
    that rounding makes indefinite, and with fewer samples than features a small matrix.

    NaN for generated features that are not all finite.

    Raises:
        ValueError: fewer than two samples in one of the sets.
    """
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < 2:
            raise ValueError(f"fid needs two samples or more in each set, {name} has less")
    if not fake.isfinite().all():
        return math.nan
    real, fake = real.double(), fake.double()
    a, b = _root(real), _root(fake)
    between = torch.linalg.svdvals(a @ b.mT).sum()
    distance = (real.mean(0) - fake.mean(0)).square().sum()
    return float((distance + a.square().sum() + b.square().sum() - 2 * between).clamp(min=0))


def _root(features: Tensor) -> Tensor:
    """A with A^T A = the unbiased covariance, of as few rows as can be."""
    centered = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    if len(features) <= features.shape[1]:
        return centered
    return torch.linalg.qr(centered, mode="r").R


def kid(
    real: Tensor, fake: Tensor, *, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, averaged over random subsets.

    Binkowski et al. (2018). A subset has `size` samples of each set, or as many as there are.
    """
    size = min(size, len(real), len(fake))
    if size < 2:
        raise ValueError("kid needs two samples or more in each set")
    generator = torch.Generator().manual_seed(seed)
    figures = []
    for _ in range(subsets):
        pair = [
            features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]
            for features in (real, fake)
        ]
        figures.append(poly_mmd(pair[0].double(), pair[1].double()))
    return float(torch.stack(figures).mean())


def inception_score(logits: Tensor, splits: int = IS_SPLITS) -> float:
    """exp E KL(p(y|x) || p(y)) of logits (N, K), averaged over `splits` parts in their order.

    Salimans et al. (2016). Without that many samples each stands in one part with its neighbours.
    """
    log_p = logits.double().log_softmax(1)
    scores = []
    for part in log_p.tensor_split(max(1, min(splits, len(log_p) // 2))):
        log_marginal = part.exp().mean(0, keepdim=True).log()
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def neighbourhoods(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage, each set's balls reaching to its k-th neighbours.

    precision: share of generated samples inside a real sample's ball (Kynkaanniemi et al., 2019).
    recall: share of real samples inside a generated sample's ball.
    density: real balls around a generated sample, over k; may exceed 1 (Naeem et al., 2020).
    coverage: share of real samples with a generated one in their ball.

    All four depend on how many samples there are, so as many of each set are taken, evenly
    spaced: the smaller set's size, at most LARGEST.

    Raises:
        ValueError: not more than k samples in one of the sets.
    """
    count = min(len(real), len(fake), LARGEST)
    if count <= k:
        raise ValueError(f"{k} neighbours need more than {k} samples in each set, not {count}")
    real, fake = (_evenly(features.double(), count) for features in (real, fake))
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    caught = torch.zeros(count, device=real.device)  # real balls around each generated sample
    recalled, covered = [], []
    for rows, radii in zip(real.split(ROWS), real_radii.split(ROWS), strict=True):
        distances = torch.cdist(rows, fake)
        inside = distances <= radii[:, None]
        caught += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distances <= fake_radii).any(1))
    return {
        "precision": float((caught > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(caught.double().mean() / k),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def precision_recall_curve(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall (PRD_SLOPES,) of distributions (PRD, Sajjadi et al., 2018).

    Both sets are counted in the clusters of their union: p and q. At slope l, from steep towards
    recall to steep towards precision, precision is sum min(l p, q) and recall sum min(p, q / l).
    As many of each set are taken, and the mean over a few clusterings, as in the paper. On one
    thread: the result then depends on no machine's count of them, and small sets are quicker.
    """
    count = min(len(real), len(fake), LARGEST)
    both = torch.cat([_evenly(features, count) for features in (real, fake)]).float().cpu().numpy()
    edge = 1e-6
    slopes = torch.linspace(edge, math.pi / 2 - edge, PRD_SLOPES, dtype=torch.float64).tan()
    clusters = min(PRD_CLUSTERS, count)
    curves = []
    for run in range(PRD_RUNS):
        with threadpool_limits(1):
            cluster = KMeans(clusters, n_init=1, random_state=run).fit(both).labels_
        sides = torch.from_numpy(cluster).long().view(2, count)
        p, q = (side.bincount(minlength=clusters).double() / count for side in sides)
        precision = torch.minimum(slopes[:, None] * p, q).sum(1)
        curves.append(torch.stack([precision, precision / slopes]))
    precision, recall = torch.stack(curves).mean(0).clamp(0, 1)
    return precision, recall


def _evenly(features: Tensor, count: int) -> Tensor:
    index = torch.arange(count, device=features.device) * len(features) // count
    return features[index]


def _radii(features: Tensor, k: int) -> Tensor:
    """The distance of each sample to its k-th neighbour, itself not counted: (N,)."""
    parts = [
        torch.cdist(rows, features).topk(k + 1, largest=False).values[:, -1]
        for rows in features.split(ROWS)
    ]
    return torch.cat(parts)
