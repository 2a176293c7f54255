"""Samples held against the real images of one domain: figures, their floor, their protocol."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gannorm.data import Batch, Data, Source
from gannorm.data.digest import digest
from gannorm.data.source import finite
from gannorm.metrics import distances
from gannorm.metrics.features import Embedded, Extractor, Inception, cached, embedded
from gannorm.metrics.figures import FIGURES, Comparison, of_sets
from gannorm.metrics.observations import Observations
from gannorm.schema import MetricsConfig

CHUNK = 128  # images seen at a time
MOST_REAL, MOST_GENERATED = 50_000, 10_000  # the latter unless metrics.samples says otherwise


class ReferenceSet:
    """The real images of one domain; what is seen of them is kept on disk by their content.

    Args:
        real: training images, unaugmented, of which at most MOST_REAL are taken, evenly spaced.
        held_out: real images that training never sees. Given `real` itself, as where there are
            none, every second training image stands in for them.
        extractor: of the features of the distances.
        reader: a classifier of the domain, if its images have labels.
        samples: how many held-out images are taken, and generated ones to be compared; None: as
            many as are held out. Distances depend on the counts: only equal ones can be compared.
    """

    def __init__(
        self, real: Source, held_out: Source, extractor: Extractor, reader: Embedded | None,
        device: torch.device, cache: Path, samples: int | None = None,
    ) -> None:  # fmt: skip
        self.extractor, self.reader, self.device = extractor, reader, device
        self.source, self.every = real, 1
        self.real = self._observed(real, cache)
        if held_out is real:
            self.every = 2
            self.real, rest = self.real[0::2], self.real[1::2]
        else:
            rest = self._observed(held_out, cache)
        self.count = min(len(rest), MOST_GENERATED) if samples is None else samples
        self.held_out = rest[evenly(len(rest), min(self.count, len(rest))).to(device)]
        self.split = "every other training image" if held_out is real else "held-out images"

    @torch.no_grad()
    def observe(self, images: Tensor, labels: Tensor | None = None) -> Observations:
        """What is seen of images (N, C, S, S) in [-1, 1]."""
        features, logits = self.extractor(images)
        predicted = None
        if self.reader is not None:
            own = logits if self.reader is self.extractor else self.reader(images)[1]
            predicted = own.argmax(1)
        kinds = logits if self.extractor.names_kinds else None
        return Observations(features, kinds, predicted, labels)

    def _observed(self, source: Source, cache: Path) -> Observations:
        networks = [net.identity() for net in (self.extractor, self.reader) if net is not None]
        key = digest(source.digest(), MOST_REAL, *networks)

        def make() -> list[Tensor | None]:
            parts = []
            for index in _chunks(source):
                batch = _fetch(source, index)
                labels = batch["label"].to(self.device) if "label" in batch else None
                parts.append(self.observe(batch["image"].to(self.device), labels))
            return [None if v is None else v.cpu() for v in Observations.joined(parts).values()]

        values = cached(cache, f"features-{key}", make)
        return Observations(*values).to(self.device)

    def nearest(self, features: Tensor, count: int) -> Tensor:
        """The `count` real images (all, if fewer) nearest to each of features (N, D):
        (N, count, C, S, S), on the CPU.

        Fetched by whole chunks, as they were observed: a source may draw on the generator.
        """
        apart = torch.cdist(features.double(), self.real.features.double())
        places = apart.topk(min(count, len(self.real)), largest=False).indices * self.every
        chunks, number = _chunks(self.source), places.cpu() // CHUNK
        batches = {k: _fetch(self.source, chunks[k])["image"] for k in number.unique().tolist()}
        rows = [[batches[k // CHUNK][k % CHUNK] for k in row] for row in places.tolist()]
        return torch.stack([torch.stack(row) for row in rows])

    def compare(self, generated: Observations) -> dict[str, float]:
        """Every figure of samples: those on features, and the accuracy where there are labels."""
        return of_sets(self.real, generated)

    def compare_classes(self, generated: Observations) -> dict[str, float]:
        """Of each class K: NAME/K, class_accuracy/K; and each NAME, the mean over the classes
        (class_fid: intra-FID, Miyato and Koyama, 2018). Both sides need labels."""
        labels, predicted = generated.labels, generated.predicted
        assert labels is not None and predicted is not None and self.real.labels is not None
        figures, accuracies = {}, {}
        for k in labels.unique().tolist():
            ours, theirs = labels == k, self.real.labels == k
            accuracies[f"class_accuracy/{k}"] = float((predicted[ours] == k).double().mean())
            if min(ours.sum(), theirs.sum()) > 1:
                sides = Comparison(self.real[theirs], generated[ours])
                for name, figure in FIGURES.items():
                    if figure.needs == "classes":
                        figures[f"{name}/{k}"] = figure.of(sides)
        means: dict[str, list[float]] = {}
        for name, value in figures.items():
            means.setdefault(name.partition("/")[0], []).append(value)
        return {n: sum(v) / len(v) for n, v in means.items()} | figures | accuracies

    def protocol(self) -> dict[str, Any]:
        """How the figures came about; figures of another protocol are others."""
        return {
            "extractor": self.extractor.protocol,
            "weights": self.extractor.identity()[:8],
            "real": f"{len(self.real)} training images",
            "floor": f"{len(self.held_out)} {self.split}",
            "generated": self.count,
            "neighbours": distances.NEIGHBOURS,
            "kid": f"{distances.KID_SUBSETS} subsets of at most {distances.KID_SIZE}",
            "inception_score": f"{distances.IS_SPLITS} splits",
        }


@dataclass
class Evaluation:
    """Figures of generators, and what they were made of, where there are references.

    observed: by direction ("" or "_AtoB"), the samples and what they were held against.
    """

    figures: dict[str, float]
    observed: dict[str, tuple[ReferenceSet, Observations]] = field(default_factory=dict)


def build_references(cfg: MetricsConfig, data: Data, device: torch.device) -> list[ReferenceSet]:
    """One for each domain of `data`.

    Raises:
        RequestError: weights that are not there.
    """
    cache = Path(cfg.cache).expanduser()
    inception = Inception(cfg.weights).to(device) if cfg.extractor == "inception" else None
    references = []
    for domain, real, held_out in zip(data.domains, data.real, data.test, strict=True):
        reader = None
        if data.num_classes is not None:
            reader = embedded(domain, data.num_classes, device, cache)
        extractor = inception or reader or embedded(real, None, device, cache)
        references.append(
            ReferenceSet(real, held_out, extractor, reader, device, cache, cfg.samples)
        )
    return references


def _chunks(source: Source) -> tuple[Tensor, ...]:
    return evenly(len(source), min(len(source), MOST_REAL)).split(CHUNK)


def _fetch(source: Source, index: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(int(index[0]))
    return finite(source.fetch(index.tolist(), generator), source, index.tolist())


def evenly(length: int, count: int) -> Tensor:
    """`count` evenly spaced indices below `length`."""
    return torch.arange(count) * length // count


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int = CHUNK) -> Tensor:
    """function(*tensors), `size` samples at a time."""
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def suffixed(figures: dict[str, float], suffix: str) -> dict[str, float]:
    return {f"{name}_{suffix}": value for name, value in figures.items()}
