"""CycleGAN (Zhu et al., 2017): unpaired image translation.

G_A translates A to B and G_B back; D_A judges domain B, D_B domain A (the reference's names).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from gannorm.config import Config, CycleGANConfig
from gannorm.data import Batch, Data, fetch_all
from gannorm.losses import ImagePool, discriminator_loss, generator_loss
from gannorm.metrics import in_chunks, read_accuracy, train_classifier
from gannorm.models import PatchDiscriminator, ResnetGenerator
from gannorm.norms import build_norm
from gannorm.tasks.task import Task

SHOWN = 8  # held-out images of each domain in a sample grid


class CycleGAN(Task):
    """Losses: adversarial, cycle consistency and identity, both ways."""

    admitted_norms = ("instance", "batch", "group", "layer", "none")
    refusal = "image translation has no labels for a conditional norm"

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        assert isinstance(cfg.model, CycleGANConfig)
        self.model: CycleGANConfig = cfg.model
        super().__init__(cfg, device, num_classes)
        self.pools = {name: ImagePool(self.model.pool_size) for name in self.discriminators}

    def _build(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        m, channels = self.model, self.cfg.data.channels
        norm = build_norm(self.cfg.norm)
        generators: dict[str, nn.Module] = {
            name: ResnetGenerator(
                channels, channels, norm, width=m.width, blocks=m.blocks,
                downsamplings=m.downsamplings, dropout=m.dropout,
            )
            for name in ("G_A", "G_B")
        }  # fmt: skip
        discriminators: dict[str, nn.Module] = {
            name: PatchDiscriminator(channels, norm, width=m.d_width, layers=m.d_layers)
            for name in ("D_A", "D_B")
        }
        return generators, discriminators

    def _dry_run(
        self, generators: dict[str, nn.Module], discriminators: dict[str, nn.Module]
    ) -> None:
        data = self.cfg.data
        x = torch.empty(data.batch_size, data.channels, data.image_size, data.image_size)
        y = generators["G_A"](x)
        if y.shape != x.shape:
            raise ValueError(
                f"images of {data.image_size} pixels come back as {y.shape[-1]}; data.image_size "
                f"must be a multiple of {2**self.model.downsamplings}"
            )
        discriminators["D_A"](x)

    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        ((batch_a, batch_b),) = batches
        a = batch_a["image"].to(self.device, non_blocking=True)
        b = batch_b["image"].to(self.device, non_blocking=True)
        g_a, g_b = self.generators["G_A"], self.generators["G_B"]
        kind, weight = self.cfg.loss.gan.name, self.model.cycle_weight

        self._freeze_discriminators(True)
        with self.autocast():
            fake_b, fake_a = g_a(a), g_b(b)
            gan_a = generator_loss(self.discriminators["D_A"](fake_b), kind)
            gan_b = generator_loss(self.discriminators["D_B"](fake_a), kind)
            cycle_a, cycle_b = l1_loss(g_b(fake_b), a), l1_loss(g_a(fake_a), b)
            loss = gan_a + gan_b + weight * (cycle_a + cycle_b)
            losses = {"G_A": gan_a, "G_B": gan_b, "cycle_A": cycle_a, "cycle_B": cycle_b}
            if self.model.identity_weight > 0:
                identity_a, identity_b = l1_loss(g_a(b), b), l1_loss(g_b(a), a)
                loss = loss + weight * self.model.identity_weight * (identity_a + identity_b)
                losses |= {"identity_A": identity_a, "identity_B": identity_b}
        self._descend("G", loss)

        self._freeze_discriminators(False)
        with self.autocast():
            for name, real, fake in (("D_A", b, fake_b), ("D_B", a, fake_a)):
                net, past = self.discriminators[name], self.pools[name].query(fake.detach())
                losses[name] = discriminator_loss(net(real), net(past), kind)
        self._descend("D", losses["D_A"] + losses["D_B"])
        return {name: value.detach() for name, value in losses.items()}

    # ---- evaluation

    def prepare_evaluation(self, data: Data) -> None:
        self.shown = [fetch_all(source, SHOWN)["image"].to(self.device) for source in data.test]
        self.held_out: list[Batch] = []
        if data.counterparts:
            assert data.num_classes is not None
            self.held_out = [
                {k: v.to(self.device) for k, v in fetch_all(source).items()} for source in data.test
            ]
            self.classifiers = [
                train_classifier(source, data.num_classes, self.device) for source in data.domains
            ]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out digits still read by a classifier of the target domain; else cycle errors."""
        figures = {}
        names = (("A", "B", "G_A", "G_B"), ("B", "A", "G_B", "G_A"))
        for here, (source, target, there, back) in enumerate(names):
            go, come = self.averaged[there], self.averaged[back]
            images = self.held_out[here]["image"] if self.held_out else self.shown[here]
            translated = in_chunks(go, images, size=32)
            figures[f"cycle_l1_{source}"] = float(
                l1_loss(in_chunks(come, translated, size=32), images)
            )
            if self.held_out:
                classifier, labels = self.classifiers[1 - here], self.held_out[here]["label"]
                figures[f"accuracy_{source}to{target}"] = read_accuracy(
                    classifier, translated, labels
                )
        return figures

    def reference_figures(self) -> dict[str, float]:
        """The floor and the ceiling of `accuracy_*`: held-out images untranslated, and real."""
        figures = {}
        for here, (source, target) in enumerate((("A", "B"), ("B", "A"))):
            if self.held_out:
                classifier, labels = self.classifiers[1 - here], self.held_out[here]["label"]
                for name, images in (
                    ("untranslated", self.held_out[here]["image"]),
                    ("real", self.held_out[1 - here]["image"]),
                ):
                    key = f"accuracy_{source}to{target}_{name}"
                    figures[key] = read_accuracy(classifier, images, labels)
        return figures

    @torch.no_grad()
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """For each direction, rows of: original, translation, and back again."""
        shown = {}
        names = (("A_to_B_to_A", "G_A", "G_B"), ("B_to_A_to_B", "G_B", "G_A"))
        for images, (title, there, back) in zip(self.shown, names, strict=True):
            fake = self.averaged[there](images)
            strip = torch.stack([images, fake, self.averaged[back](fake)], 1)
            shown[title] = (strip.flatten(0, 1), 3)
        return shown

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        pools = {name: pool.state_dict() for name, pool in self.pools.items()}
        return {**super().state_dict(), "pools": pools}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, pool in self.pools.items():
            pool.load_state_dict(state["pools"][name])
