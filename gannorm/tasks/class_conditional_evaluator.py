"""How good a class-conditional GAN's samples are, and pictures of them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gannorm import parallel
from gannorm.data import Data
from gannorm.diagnostics.faults import Probe
from gannorm.metrics.evaluation import CHUNK, Evaluation, evenly, in_chunks, suffixed
from gannorm.metrics.observations import Observations
from gannorm.norms.layers import ConditionalBatchNorm2d, ConditionalInstanceNorm2d
from gannorm.parallel import drawn
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.tasks.evaluator import Evaluator
from gannorm.tasks.task import Networks

SHOWN = 10  # classes and noises in a sample grid, at most
PROBED = 200  # that the diagnostics look at
NEAREST = 3  # training images beside a sample


class ClassConditionalEvaluator(Evaluator[ClassConditional]):
    """Samples of fixed noises, the classes in turn."""

    measures = ("features", "kinds", "labels", "classes")

    def __init__(self, task: ClassConditional, data: Data) -> None:
        super().__init__(task, data)
        self.model, self.num_classes = task.model, task.num_classes
        count = max(self.references[0].count, SHOWN**2, PROBED)
        generator = torch.Generator().manual_seed(self.cfg.seed)
        self.noise = torch.randn(count, self.model.z_dim, generator=generator).to(self.device)
        self.labels = task.labels(count)
        (test,) = data.test
        index = evenly(len(test), min(len(test), PROBED)).tolist()
        batch = test.fetch(index, torch.Generator())
        self.probed = {name: value.to(self.device) for name, value in batch.items()}

    def measure(self, generators: Networks, brief: bool) -> Evaluation:
        """Of as many samples as the reference says, the classes in turn."""
        (reference,) = self.references
        starts = range(0, reference.count, CHUNK)
        pieces = [slice(start, min(start + CHUNK, reference.count)) for start in starts]
        parts = (
            reference.observe(generators["G"](self.noise[p], self._labels(p)), self._labels(p))
            for p in parallel.each(pieces[parallel.own(len(pieces))])
        )
        samples = Observations.of_all(parts, self.device)
        return Evaluation(self._compared(samples), {"": (reference, samples)})

    def _labels(self, piece: slice) -> Tensor | None:
        return None if self.labels is None else self.labels[piece]

    def _compared(self, samples: Observations) -> dict[str, float]:
        (reference,) = self.references
        figures = reference.compare(samples)
        return figures if self.labels is None else figures | reference.compare_classes(samples)

    def standing_forwards(self, name: str, net: Any, count: int) -> list[Callable[[], Any]]:
        generator = torch.Generator().manual_seed(self.cfg.seed)
        n, classes, z_dim = self.cfg.data.batch_size, self.num_classes, self.model.z_dim

        def forward() -> None:
            noise = drawn(lambda count: torch.randn(count, z_dim, generator=generator), n)
            labels = None
            if classes is not None:
                labels = drawn(lambda k: torch.randint(classes, (k,), generator=generator), n)
                labels = labels.to(self.device)
            net(noise.to(self.device), labels)

        return [forward] * count

    def reference_figures(self) -> dict[str, float]:
        """The floor, or the ceiling: held-out real images."""
        (reference,) = self.references
        return suffixed(self._compared(reference.held_out), "real")

    def probes(self) -> dict[str, Probe]:
        labels, noise = self._labels(slice(PROBED)), self.noise[:PROBED]
        images = self._images(noise, labels)
        return {"": Probe(images, self.probed["image"], labels, self.probed.get("label"))}

    def _images(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        net = self.task.averaged["G"]
        if labels is None:
            return in_chunks(lambda z: net(z, None), noise)
        return in_chunks(net, noise, labels)

    @torch.no_grad()
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class, a column for each of some fixed noises."""
        if self.num_classes is None:
            return {"noises": (self._images(self.noise[: SHOWN**2], None), SHOWN)}
        rows = min(self.num_classes, SHOWN)
        labels = torch.arange(rows, device=self.device).repeat_interleave(SHOWN)
        noise = self.noise[:SHOWN].repeat(rows, 1)
        return {"class_by_noise": (in_chunks(self.task.averaged["G"], noise, labels), SHOWN)}

    @torch.no_grad()
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class: from one noise to another; from this class to the next, the
        noise fixed. A column for each class: a sample, and the training images nearest to it.

        Without classes: a row of noises on the way from one to the next, and the columns."""
        if self.num_classes is None:
            return self._pictures_without_classes()
        net = self.task.averaged["G"]
        classes = self.num_classes
        rows = torch.arange(min(classes, SHOWN), device=self.device)
        columns = torch.linspace(0, 1, SHOWN, device=self.device)
        labels = rows.repeat_interleave(SHOWN)

        path = slerp(self.noise[0], self.noise[1], columns)
        noises = in_chunks(net, path.repeat(len(rows), 1), labels)

        one_hot = torch.eye(classes, device=self.device)
        share = columns.repeat(len(rows))[:, None]
        mix = torch.lerp(one_hot[labels], one_hot[(labels + 1) % classes], share)
        every = torch.arange(len(mix), device=self.device)
        between = in_chunks(mixed(net, mix), self.noise[:1].expand(len(mix), -1), every)

        beneath = self._beneath(net(self.noise[: len(rows)], rows))
        return {
            "interpolation/noise_to_noise_in_each_class": (noises, SHOWN),
            "interpolation/each_class_to_the_next": (between, SHOWN),
            "neighbours/samples_above_nearest_training_images": (beneath, len(rows)),
        }

    def _pictures_without_classes(self) -> dict[str, tuple[Tensor, int]]:
        columns = torch.linspace(0, 1, SHOWN, device=self.device)
        ways = [slerp(self.noise[i], self.noise[i + 1], columns) for i in range(SHOWN)]
        samples = self._images(self.noise[:SHOWN], None)
        return {
            "interpolation/noise_to_noise": (self._images(torch.cat(ways), None), SHOWN),
            "neighbours/samples_above_nearest_training_images": (self._beneath(samples), SHOWN),
        }

    def _beneath(self, samples: Tensor) -> Tensor:
        """Samples, and in rows beneath them the training images nearest to each."""
        (reference,) = self.references
        nearest = reference.nearest(reference.observe(samples).features, NEAREST)
        return torch.cat([samples[None], nearest.to(self.device).transpose(0, 1)]).flatten(0, 1)

    def captions(self, name: str) -> tuple[Sequence[str], Sequence[str]]:
        """The classes of the rows, of the columns where a class is one."""
        names = self.task.class_names[:SHOWN] if self.named else []
        return ((), names) if name.startswith("neighbours/") else (names, ())


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """From noise `start` (Z,) to `end` (Z,) on a great circle, at `share` (N,) of the way: (N, Z).

    White (2016): a straight line would lead through noises shorter than any that are drawn.
    """
    if len(start) == 1:  # no circle through one number
        return torch.lerp(start, end, share[:, None])
    angle = torch.cosine_similarity(start, end, dim=0).acos()
    a, b = ((1 - share) * angle).sin(), (share * angle).sin()
    return (a[:, None] * start + b[:, None] * end) / angle.sin()


def mixed(net: nn.Module, mix: Tensor) -> nn.Module:
    """A copy of generator `net` whose class m is the mixture mix[m] (K,) of its K classes.

    A class is a row in each of the tables, of norms or of the embedding: mixtures are other rows.
    """
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Embedding):  # anew, for it may be spectrally normalized
            net.set_submodule(name, nn.Embedding.from_pretrained(mix @ module.weight))
        elif isinstance(module, ConditionalBatchNorm2d | ConditionalInstanceNorm2d):
            module.weight = nn.Parameter(mix @ module.weight)
            module.bias = nn.Parameter(mix @ module.bias)
    return net
