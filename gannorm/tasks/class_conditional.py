"""The ResBlock GAN, by class (SNGAN-projection, Miyato and Koyama, 2018) or without classes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gannorm.data import Batch
from gannorm.errors import RequestError
from gannorm.models import ProjectionDiscriminator, ResBlockGenerator
from gannorm.models.norm_factory import Norm, build_norm
from gannorm.parallel import drawn
from gannorm.schema import Config, ResBlockGANConfig
from gannorm.tasks.losses import LOSSES, generator_loss
from gannorm.tasks.task import Networks, Sides, Task, averaged

WITHOUT = "all"  # in the place of class names where there are no classes


class ClassConditional(Task):
    """`optim.d_steps` steps of the discriminator, one of the generator."""

    takes_labels = True

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        assert isinstance(cfg.model, ResBlockGANConfig)
        self.model: ResBlockGANConfig = cfg.model
        self.batches_per_step = cfg.optim.d_steps * cfg.trainer.grad_accum
        super().__init__(cfg, device, num_classes)
        if num_classes is None:
            self.class_names = [WITHOUT]

    @classmethod
    def refusal(cls, norm: Norm, cfg: Config) -> str:
        if norm.unconditional is not None and not getattr(cfg.data, "labels", True):
            return "data.labels=false: the rows of its tables are chosen by class"
        return ""

    def _build(self, spectral: bool = True) -> tuple[Networks, Networks]:
        m, data, classes = self.model, self.cfg.data, self.num_classes
        size, channels = 4 * 2 ** (len(m.g_widths) - 1), data.channel_pair[0]
        if data.size != (size, size):
            raise RequestError(
                f"model.g_widths={m.g_widths} makes images of {size} pixels and "
                f"data.image_size is {data.image_size}; the list needs one width for 4x4 "
                "and one for each doubling"
            )
        if channels != data.channel_pair[1]:
            raise RequestError(
                f"data.channels={data.channels} are two domains', and model={self.cfg.model.name} "
                "has one; set data.channels=1 or data.channels=3"
            )
        generator = ResBlockGenerator(
            build_norm(self.cfg.norm, classes), num_classes=classes, z_dim=m.z_dim,
            widths=m.g_widths, block=m.block, out_channels=channels,
            spectral=spectral and m.g_spectral_norm, init=m.init,
        )  # fmt: skip
        discriminator = ProjectionDiscriminator(
            num_classes=classes, in_channels=channels, widths=m.d_widths,
            downsamplings=m.d_downsamplings, spectral=spectral and m.d_spectral_norm,
            init=m.init,
        )  # fmt: skip
        return {"G": generator}, {"D": discriminator}

    def _dry_run(self, generators: Networks, discriminators: Networks) -> None:
        n = self.cfg.data.whole_batch
        labels = None if self.num_classes is None else torch.zeros(n, dtype=torch.int64)
        images = generators["G"](torch.empty(n, self.model.z_dim), labels)
        discriminators["D"](images, labels)

    def noise(self, count: int) -> Tensor:
        return drawn(lambda n: torch.randn(n, self.model.z_dim, device=self.device), count)

    def labels(self, count: int) -> Tensor | None:
        """The classes in turn (count,); None where there are none."""
        if self.num_classes is None:
            return None
        return torch.arange(count, device=self.device) % self.num_classes

    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for first in range(0, len(batches), self.parts):
            seen = [self._real(batch) for (batch,) in batches[first : first + self.parts]]
            losses = self._train_discriminators(self._sides(*each) for each in seen)

        self._freeze_discriminators(True)
        found: list[dict[str, Tensor]] = []
        gradient = self._descend("G", (self._generate(*each, found) for each in seen))
        losses |= {"balance/gradient_G": gradient, **averaged(found)}
        self._freeze_discriminators(False)
        return {name: value.detach() for name, value in losses.items()}

    def _real(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        labels = None
        if self.num_classes is not None:
            labels = batch["label"].to(self.device, non_blocking=True)
        return self.on_device(batch["image"]), labels

    def _critic(self, *images: Tensor, labels: Tensor | None) -> Sequence[Tensor]:
        # One pass over all of them: larger convolutions.
        each = None if labels is None else labels.repeat(len(images))
        logits = self.discriminators["D"](self._augment(torch.cat(images)), each)
        return logits.float().chunk(len(images))

    def _sides(self, real: Tensor, labels: Tensor | None) -> Sides:
        """What the discriminator is shown."""
        with torch.no_grad(), self.autocast():
            fake = self.generators["G"](self.noise(len(real)), labels)
        return {"D": (partial(self._critic, labels=labels), real, fake)}

    def _generate(
        self, real: Tensor, labels: Tensor | None, found: list[dict[str, Tensor]]
    ) -> Tensor:
        """What the generator minimizes, which goes to `found` too."""
        g, kind, classes, n = self.generators["G"], self.cfg.loss.gan, self.num_classes, len(real)
        with self.autocast():
            real_logits = None
            if LOSSES[kind].needs_real:  # a pair has one class
                with torch.no_grad():
                    (real_logits,) = self._critic(real, labels=labels)
            else:
                n = self.cfg.data.batch_size
                if classes is not None:
                    labels = drawn(
                        lambda count: torch.randint(classes, (count,), device=self.device), n
                    )
            (logits,) = self._critic(g(self.noise(n), labels), labels=labels)
            loss = generator_loss(logits, kind, real_logits)
        found.append({"G": loss})
        return loss
