"""How good a CycleGAN's translations are, and pictures of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gannorm import parallel
from gannorm.data import Data, batches, fetch_all
from gannorm.diagnostics.faults import Probe
from gannorm.metrics.evaluation import MOST_GENERATED, Evaluation, evenly, in_chunks, suffixed
from gannorm.metrics.figures import FIGURES, Needs, Pairs, of_pairs
from gannorm.metrics.observations import Observations
from gannorm.tasks.cyclegan import CycleGAN
from gannorm.tasks.evaluator import Evaluator
from gannorm.tasks.task import Networks

SHOWN = 8  # held-out images of each domain in a sample grid
NEAREST = 3  # training images beside a translation
PROBED = 64  # that the diagnostics look at
TRANSLATED = 32  # at a time while evaluating


class Direction(NamedTuple):
    """From domain number `source` to `target`; name: AtoB; by generator, and back by inverse."""

    source: int
    target: int
    name: str
    generator: str
    inverse: str


DIRECTIONS = (Direction(0, 1, "AtoB", "G_A", "G_B"), Direction(1, 0, "BtoA", "G_B", "G_A"))


class CycleGANEvaluator(Evaluator[CycleGAN]):
    """Held-out images are translated, and back."""

    measures = ("features", "kinds", "labels", "cycle", "counterparts")

    def __init__(self, task: CycleGAN, data: Data) -> None:
        super().__init__(task, data)
        self.probed = [fetch_all(source, PROBED)["image"].to(self.device) for source in data.test]
        self.shown = [images[:SHOWN] for images in self.probed]

    def measure(self, generators: Networks, brief: bool) -> Evaluation:
        """Translations of the held-out images and, unless brief, what comes back of them."""
        evaluation = Evaluation({})
        for way in DIRECTIONS:
            inverse = None if brief else generators[way.inverse]
            figures, translations = self._translate(way, generators[way.generator], inverse)
            for name, value in figures.items():
                end = way.name[0] if FIGURES[name].needs == "cycle" else way.name
                evaluation.figures[f"{name}_{end}"] = value
            reference = self.references[way.target]
            evaluation.figures |= suffixed(reference.compare(translations), way.name)
            evaluation.observed[f"_{way.name}"] = (reference, translations)
        return evaluation

    def _translate(
        self,
        way: Direction,
        generator: Callable[[Tensor], Tensor],
        inverse: Callable[[Tensor], Tensor] | None,
    ) -> tuple[dict[str, float], Observations]:
        """The held-out images through `generator` (and `inverse`): the figures of pairs, averaged,
        and what networks see in the translations."""
        test, target = self.data.test[way.source], self.data.test[way.target]
        reference = self.references[way.target]
        scores: list[tuple[str, Tensor]] = []
        parts: list[Observations] = []

        def add(pairs: Pairs, needs: Needs) -> None:
            scores.extend((name, v.double()) for name, v in of_pairs(pairs, needs).items())

        chunks = evenly(len(test), self._count(way)).split(TRANSLATED)
        for index in parallel.each(chunks[parallel.own(len(chunks))]):
            batch = test.fetch(index.tolist(), torch.Generator())
            images = batch["image"].to(self.device)
            translated = generator(images)
            if inverse is not None:
                add(Pairs(inverse(translated), images), "cycle")
            labels = batch["label"].to(self.device) if "label" in batch else None
            parts.append(reference.observe(translated, labels))
            if self.data.counterparts:
                true = target.fetch(index.tolist(), torch.Generator())["image"]
                pairs = Pairs(translated, true.to(self.device), reference.reader)
                add(pairs, "counterparts")
        whole: dict[str, list[Tensor]] = {}
        for name, values in parallel.joined([(name, v.cpu()) for name, v in scores]):
            whole.setdefault(name, []).append(values)
        means = {name: float(torch.cat(values).mean()) for name, values in whole.items()}
        return means, Observations.of_all(parts, self.device)

    def _count(self, way: Direction) -> int:
        """How many held-out images are translated."""
        return min(len(self.data.test[way.source]), self.cfg.metrics.samples or MOST_GENERATED)

    def protocol(self) -> dict[str, Any]:
        protocol = super().protocol()
        for way in DIRECTIONS:
            protocol[way.name[-1]]["generated"] = self._count(way)
        return protocol

    def standing_forwards(self, name: str, net: Any, count: int) -> list[Callable[[], Any]]:
        (domain,) = [way.source for way in DIRECTIONS if way.generator == name]
        size, seed = self.cfg.data.whole_batch, self.cfg.seed
        own = [self.data.domains[domain]]
        part = parallel.own(size)
        drawn = batches(own, batch_size=size, start=0, stop=count, seed=seed, own=part)
        images = [batch["image"].to(self.device) for (batch,) in drawn]
        return [partial(net, x) for x in images]

    @torch.no_grad()
    def reference_figures(self) -> dict[str, float]:
        """The floor and the ceiling: real held-out images, and untranslated ones."""
        out: dict[str, float] = {}
        for way in DIRECTIONS:
            reference = self.references[way.target]
            figures = reference.compare(reference.held_out)
            out |= suffixed(figures, f"{way.name}_real")
            if len(set(self.cfg.data.channel_pair)) == 1:  # else A is no image of B's kind
                scores, untranslated = self._translate(way, lambda images: images, None)
                figures = scores | reference.compare(untranslated)
                out |= suffixed(figures, f"{way.name}_untranslated")
        return out

    def probes(self) -> dict[str, Probe]:
        """Translations should be bright and dark with their counterparts; else their originals."""
        probes = {}
        for way in DIRECTIONS:
            originals, real = self.probed[way.source], self.probed[way.target]
            images = in_chunks(self.task.averaged[way.generator], originals, size=TRANSLATED)
            like = real if self.data.counterparts else originals
            probes[f"_{way.name}"] = Probe(images, real, like=like)
        return probes

    @torch.no_grad()
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """For each direction, rows of: original, translation, and back again."""
        shown = {}
        for way in DIRECTIONS:
            images = self.shown[way.source]
            fake = self.task.averaged[way.generator](images)
            back = self.task.averaged[way.inverse](fake)
            strip = torch.stack(_alike(images, fake, back), 1)
            first, last = way.name[0], way.name[-1]
            shown[f"{first}_to_{last}_to_{first}"] = (strip.flatten(0, 1), 3)
        return shown

    @torch.no_grad()
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """For each direction, columns of: original, translation, and the training images of the
        other domain that are nearest to it."""
        shown = {}
        for way in DIRECTIONS:
            reference, images = self.references[way.target], self.shown[way.source]
            fake = self.task.averaged[way.generator](images)
            nearest = reference.nearest(reference.observe(fake).features, NEAREST)
            found = nearest.to(self.device).transpose(0, 1)
            rows = torch.stack(_alike(images, fake, *found))
            name = f"neighbours/{way.name[0]}_to_{way.name[-1]}_above_nearest_training_images"
            shown[name] = (rows.flatten(0, 1), len(images))
        return shown


def _alike(*batches: Tensor) -> list[Tensor]:
    """Grey batches (N, 1, H, W) as colour where others are."""
    channels = max(x.shape[1] for x in batches)
    return [x.expand(-1, channels, -1, -1) for x in batches]
