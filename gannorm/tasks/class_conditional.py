"""The class-conditional ResBlock GAN (SNGAN-projection, Miyato and Koyama, 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gannorm.data import Batch
from gannorm.errors import RequestError
from gannorm.models import ProjectionDiscriminator, ResBlockGenerator
from gannorm.models.norm_factory import build_norm
from gannorm.schema import Config, ResBlockGANConfig
from gannorm.tasks.losses import LOSSES, generator_loss
from gannorm.tasks.task import Networks, Task


class ClassConditional(Task):
    """`optim.d_steps` steps of the discriminator, one of the generator."""

    needs_labels = True

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        assert isinstance(cfg.model, ResBlockGANConfig)
        self.model: ResBlockGANConfig = cfg.model
        self.batches_per_step = cfg.optim.d_steps
        super().__init__(cfg, device, num_classes)

    def _build(self, spectral: bool = True) -> tuple[Networks, Networks]:
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
        n = self.cfg.data.batch_size
        labels = torch.zeros(n, dtype=torch.int64)
        images = generators["G"](torch.empty(n, self.model.z_dim), labels)
        discriminators["D"](images, labels)

    def noise(self, count: int) -> Tensor:
        return torch.randn(count, self.model.z_dim, device=self.device)

    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        g, d = self.generators["G"], self.discriminators["D"]
        kind, classes = self.cfg.loss.gan, self.num_classes or 0
        losses = {}
        for (batch,) in batches:
            real = batch["image"].to(self.device, non_blocking=True)
            labels = batch["label"].to(self.device, non_blocking=True)

            def critic(*images: Tensor, labels: Tensor = labels) -> Sequence[Tensor]:
                # One pass over all of them: one power iteration, and larger convolutions.
                logits = d(self._augment(torch.cat(images)), labels.repeat(len(images)))
                return logits.float().chunk(len(images))

            with torch.no_grad(), self.autocast():
                fake = g(self.noise(len(real)), labels)
            losses = self._train_discriminators({"D": (critic, real, fake)})

        self._freeze_discriminators(True)
        with self.autocast():
            if LOSSES[kind].needs_real:  # a pair has one class
                with torch.no_grad():
                    (real_logits,) = critic(real)
                (fake_logits,) = critic(g(self.noise(len(real)), labels))
                loss = generator_loss(fake_logits, kind, real_logits)
            else:
                n = self.cfg.data.batch_size
                labels = torch.randint(classes, (n,), device=self.device)
                fake = g(self.noise(n), labels)
                loss = generator_loss(critic(fake, labels=labels)[0], kind)
        losses["balance/gradient_G"] = self._descend("G", loss)
        self._freeze_discriminators(False)
        losses["G"] = loss
        return {name: value.detach() for name, value in losses.items()}
