"""How good a class-conditional GAN's samples are, and pictures of them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gannorm.data import Data
from gannorm.diagnostics.faults import Probe
from gannorm.metrics.evaluation import CHUNK, Evaluation, evenly, in_chunks, suffixed
from gannorm.metrics.observations import Observations
from gannorm.norms.layers import ConditionalBatchNorm2d, ConditionalInstanceNorm2d
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.tasks.evaluator import Evaluator
from gannorm.tasks.task import Networks

SHOWN = 10  # classes and noises in a sample grid, at most
PROBED = 200  # that the diagnostics look at
NEAREST = 3  # training images beside a sample


class ClassConditionalEvaluator(Evaluator[ClassConditional]):
    """Samples of fixed noises, the classes in turn."""

    measures = ("features", "labels", "classes")

    def __init__(self, task: ClassConditional, data: Data) -> None:
        super().__init__(task, data)
        self.model, self.num_classes = task.model, task.num_classes or 0
        count = max(self.references[0].count, SHOWN, PROBED)
        generator = torch.Generator().manual_seed(self.cfg.seed)
        self.noise = torch.randn(count, self.model.z_dim, generator=generator).to(self.device)
        self.labels = (torch.arange(count) % self.num_classes).to(self.device)
        (test,) = data.test
        index = evenly(len(test), min(len(test), PROBED)).tolist()
        batch = test.fetch(index, torch.Generator())
        self.probed = {name: value.to(self.device) for name, value in batch.items()}

    def measure(self, generators: Networks, brief: bool) -> Evaluation:
        """Of as many samples as the reference says, the classes in turn."""
        (reference,) = self.references
        noise, labels = self.noise[: reference.count], self.labels[: reference.count]
        samples = Observations.joined(
            reference.observe(generators["G"](z, y), y)
            for z, y in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True)
        )
        figures = reference.compare(samples) | reference.compare_classes(samples)
        return Evaluation(figures, {"": (reference, samples)})

    def standing_forwards(self, name: str, net: Any, count: int) -> list[Callable[[], Any]]:
        generator = torch.Generator().manual_seed(self.cfg.seed)
        n, classes = self.cfg.data.batch_size, self.num_classes

        def forward() -> None:
            noise = torch.randn(n, self.model.z_dim, generator=generator)
            labels = torch.randint(classes, (n,), generator=generator)
            net(noise.to(self.device), labels.to(self.device))

        return [forward] * count

    def reference_figures(self) -> dict[str, float]:
        """The floor, or the ceiling: held-out real images."""
        (reference,) = self.references
        real = reference.held_out
        return suffixed(reference.compare(real) | reference.compare_classes(real), "real")

    def probes(self) -> dict[str, Probe]:
        labels = self.labels[:PROBED]
        images = in_chunks(self.task.averaged["G"], self.noise[:PROBED], labels)
        return {"": Probe(images, self.probed["image"], labels, self.probed["label"])}

    @torch.no_grad()
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class, a column for each of some fixed noises."""
        rows = min(self.num_classes, SHOWN)
        labels = torch.arange(rows, device=self.device).repeat_interleave(SHOWN)
        noise = self.noise[:SHOWN].repeat(rows, 1)
        return {"class_by_noise": (in_chunks(self.task.averaged["G"], noise, labels), SHOWN)}

    @torch.no_grad()
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class: from one noise to another; from this class to the next, the
        noise fixed. A column for each class: a sample, and the training images nearest to it."""
        net, (reference,) = self.task.averaged["G"], self.references
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

        samples = net(self.noise[: len(rows)], rows)
        nearest = reference.nearest(reference.observe(samples).features, NEAREST)
        beneath = torch.cat([samples[None], nearest.to(self.device).transpose(0, 1)])
        return {
            "interpolation/noise_to_noise_in_each_class": (noises, SHOWN),
            "interpolation/each_class_to_the_next": (between, SHOWN),
            "neighbours/samples_above_nearest_training_images": (beneath.flatten(0, 1), len(rows)),
        }


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
