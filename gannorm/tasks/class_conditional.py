"""The class-conditional ResBlock GAN (SNGAN-projection, Miyato and Koyama, 2018)."""

import torch
from torch import Tensor, nn

from gannorm.config import Config, ResBlockGANConfig
from gannorm.data import Batch, Data
from gannorm.errors import RequestError
from gannorm.losses import discriminator_loss, generator_loss
from gannorm.metrics import in_chunks, read_accuracy, train_classifier
from gannorm.models import ProjectionDiscriminator, ResBlockGenerator
from gannorm.norms import build_norm
from gannorm.tasks.task import Task

SHOWN = 10  # classes and noises in a sample grid, at most
EVALUATED = 1000  # generated images that the classifier reads


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

    def _build(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
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
            spectral=m.g_spectral_norm, init=m.init.name,
        )  # fmt: skip
        discriminator = ProjectionDiscriminator(
            num_classes=classes, in_channels=channels, widths=m.d_widths,
            downsamplings=m.d_downsamplings, init=m.init.name,
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
            with self.autocast():
                with torch.no_grad():
                    fake = g(self._noise(len(real)), labels)
                # One pass over both halves: one power iteration, and larger convolutions.
                logits = d(torch.cat([real, fake]), torch.cat([labels, labels]))
                real_logits, fake_logits = logits.float().chunk(2)
                loss = discriminator_loss(real_logits, fake_logits, kind)
            self._descend("D", loss)
            losses = {"D": loss, "D_real": real_logits.mean(), "D_fake": fake_logits.mean()}

        self._freeze_discriminators(True)
        n = self.cfg.data.batch_size
        labels = torch.randint(classes, (n,), device=self.device)
        with self.autocast():
            loss = generator_loss(d(g(self._noise(n), labels), labels), kind)
        self._descend("G", loss)
        self._freeze_discriminators(False)
        losses["G"] = loss
        return {name: value.detach() for name, value in losses.items()}

    # ---- evaluation

    def prepare_evaluation(self, data: Data) -> None:
        classes = self.num_classes or 0
        generator = torch.Generator().manual_seed(self.cfg.seed)
        self.noise = torch.randn(EVALUATED, self.model.z_dim, generator=generator).to(self.device)
        self.labels = (torch.arange(EVALUATED) % classes).to(self.device)
        self.test = data.test[0]
        self.classifier = train_classifier(data.domains[0], classes, self.device)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How many of 1,000 samples are read as the class that they were asked for."""
        images = in_chunks(self.averaged["G"], self.noise, self.labels)
        return {"accuracy": read_accuracy(self.classifier, images, self.labels)}

    def reference_figures(self) -> dict[str, float]:
        """The ceiling of `accuracy`: held-out real images."""
        every = max(1, len(self.test) // EVALUATED)
        batch = self.test.fetch(list(range(0, len(self.test), every)), torch.Generator())
        images, labels = batch["image"].to(self.device), batch["label"].to(self.device)
        return {"accuracy_real": read_accuracy(self.classifier, images, labels)}

    @torch.no_grad()
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """A row for each class, a column for each of some fixed noises."""
        rows = min(self.num_classes or 0, SHOWN)
        labels = torch.arange(rows, device=self.device).repeat_interleave(SHOWN)
        noise = self.noise[:SHOWN].repeat(rows, 1)
        return {"class_by_noise": (in_chunks(self.averaged["G"], noise, labels), SHOWN)}
