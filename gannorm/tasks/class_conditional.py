"""The class-conditional ResBlock GAN (SNGAN-projection, Miyato and Koyama, 2018)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gannorm.config import Config, ResBlockGANConfig
from gannorm.data import Batch, Data
from gannorm.diagnostics.faults import Probe
from gannorm.errors import RequestError
from gannorm.metrics.evaluation import (
    CHUNK,
    Judged,
    Seen,
    build_references,
    evenly,
    in_chunks,
    suffixed,
)
from gannorm.models import ProjectionDiscriminator, ResBlockGenerator
from gannorm.models.norm_factory import build_norm
from gannorm.norms.layers import ConditionalBatchNorm2d, ConditionalInstanceNorm2d
from gannorm.tasks.losses import generator_loss
from gannorm.tasks.task import Task

SHOWN = 10  # classes and noises in a sample grid, at most
PROBED = 200  # that the diagnostics look at
NEAREST = 3  # training images beside a sample


class ClassConditional(Task):
    """`optim.d_steps` steps of the discriminator, one of the generator."""

    admitted_norms = (
        "conditional_batch", "conditional_instance", "batch", "instance", "group", "layer", "none",
    )  # fmt: skip

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        assert isinstance(cfg.model, ResBlockGANConfig)
        self.model: ResBlockGANConfig = cfg.model
        if num_classes is None:
            raise RequestError(
                f"model={cfg.model.name} needs labelled data, and data={cfg.data.name} has no "
                "labels; choose data= digits, image_folder, cifar10, mnist"
            )
        self.batches_per_step = cfg.optim.d_steps
        super().__init__(cfg, device, num_classes)

    def _build(self, spectral: bool = True) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        m, channels, classes = self.model, self.cfg.data.channels, self.num_classes or 0
        size = 4 * 2 ** (len(m.g_widths) - 1)
        if size != self.cfg.data.image_size:
            raise RequestError(
                f"model.g_widths={m.g_widths} makes images of {size} pixels and "
                f"data.image_size is {self.cfg.data.image_size}; the list needs one width for 4x4 "
                "and one for each doubling"
            )
        generator = ResBlockGenerator(
            build_norm(self.cfg.norm, classes), num_classes=classes, z_dim=m.z_dim,
            widths=m.g_widths, block=m.block.name, out_channels=channels,
            spectral=spectral and m.g_spectral_norm, init=m.init.name,
        )  # fmt: skip
        discriminator = ProjectionDiscriminator(
            num_classes=classes, in_channels=channels, widths=m.d_widths,
            downsamplings=m.d_downsamplings, spectral=spectral and m.d_spectral_norm,
            init=m.init.name,
        )  # fmt: skip
        return {"G": generator}, {"D": discriminator}

    def _dry_run(
        self, generators: dict[str, nn.Module], discriminators: dict[str, nn.Module]
    ) -> None:
        n = self.cfg.data.batch_size
        labels = torch.zeros(n, dtype=torch.int64)
        images = generators["G"](torch.empty(n, self.model.z_dim), labels)
        discriminators["D"](images, labels)

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, self.model.z_dim, device=self.device)

    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        g, d = self.generators["G"], self.discriminators["D"]
        kind, classes = self.cfg.loss.gan.name, self.num_classes or 0
        losses = {}
        for (batch,) in batches:
            real = batch["image"].to(self.device, non_blocking=True)
            labels = batch["label"].to(self.device, non_blocking=True)

            def judge(*images: Tensor, labels: Tensor = labels) -> Sequence[Tensor]:
                # One pass over all of them: one power iteration, and larger convolutions.
                logits = d(self._augment(torch.cat(images)), labels.repeat(len(images)))
                return logits.float().chunk(len(images))

            with torch.no_grad(), self.autocast():
                fake = g(self._noise(len(real)), labels)
            losses = self._train_discriminators({"D": (judge, real, fake)})

        self._freeze_discriminators(True)
        with self.autocast():
            if kind == "relativistic":  # a pair has one class
                with torch.no_grad():
                    (real_logits,) = judge(real)
                (fake_logits,) = judge(g(self._noise(len(real)), labels))
                loss = generator_loss(fake_logits, kind, real_logits)
            else:
                n = self.cfg.data.batch_size
                labels = torch.randint(classes, (n,), device=self.device)
                fake = g(self._noise(n), labels)
                loss = generator_loss(judge(fake, labels=labels)[0], kind)
        losses["balance/gradient_G"] = self._descend("G", loss)
        self._freeze_discriminators(False)
        losses["G"] = loss
        return {name: value.detach() for name, value in losses.items()}

    # ---- evaluation

    def prepare_evaluation(self, data: Data) -> None:
        self.references = build_references(self.cfg.metrics, data, self.device)
        count = max(self.references[0].count, SHOWN, PROBED)
        generator = torch.Generator().manual_seed(self.cfg.seed)
        self.noise = torch.randn(count, self.model.z_dim, generator=generator).to(self.device)
        self.labels = (torch.arange(count) % (self.num_classes or 0)).to(self.device)
        (test,) = data.test
        index = evenly(len(test), min(len(test), PROBED)).tolist()
        batch = test.fetch(index, torch.Generator())
        self.probed = {name: value.to(self.device) for name, value in batch.items()}

    def judge(self, generators: dict[str, nn.Module], brief: bool) -> Judged:
        """Of as many samples as the reference says, the classes in turn."""
        (reference,) = self.references
        noise, labels = self.noise[: reference.count], self.labels[: reference.count]
        seen = Seen.joined(
            reference.observe(generators["G"](z, y), y)
            for z, y in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True)
        )
        figures = reference.compare(seen) | reference.compare_classes(seen)
        return Judged(figures, {"": (reference, seen)})

    def standing_forwards(self, name: str, net: nn.Module, count: int) -> list[Callable[[], Any]]:
        generator = torch.Generator().manual_seed(self.cfg.seed)
        n, classes = self.cfg.data.batch_size, self.num_classes or 0

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
        images = in_chunks(self.averaged["G"], self.noise[:PROBED], labels)
        return {"": Probe(images, self.probed["image"], labels, self.probed["label"])}

    @torch.no_grad()
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class, a column for each of some fixed noises."""
        rows = min(self.num_classes or 0, SHOWN)
        labels = torch.arange(rows, device=self.device).repeat_interleave(SHOWN)
        noise = self.noise[:SHOWN].repeat(rows, 1)
        return {"class_by_noise": (in_chunks(self.averaged["G"], noise, labels), SHOWN)}

    @torch.no_grad()
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class: from one noise to another; from this class to the next, the
        noise fixed. A column for each class: a sample, and the training images nearest to it."""
        net, (reference,) = self.averaged["G"], self.references
        classes = self.num_classes or 0
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
