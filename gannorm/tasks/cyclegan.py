"""CycleGAN (Zhu et al., 2017): unpaired image translation.

G_A translates A to B and G_B back; D_A judges domain B, D_B domain A (the reference's names).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from gannorm.config import Config, CycleGANConfig
from gannorm.data import Batch, Data, batches, fetch_all
from gannorm.diagnostics.faults import Probe
from gannorm.errors import RequestError
from gannorm.metrics.evaluation import (
    MOST_GENERATED,
    Judged,
    Seen,
    build_references,
    evenly,
    in_chunks,
    suffixed,
)
from gannorm.metrics.similarity import SMALLEST, feature_distance, psnr, ssim
from gannorm.models import PatchDiscriminator, ResnetGenerator
from gannorm.models.norm_factory import build_norm
from gannorm.tasks.losses import ImagePool, generator_loss, is_penalized
from gannorm.tasks.task import Task

SHOWN = 8  # held-out images of each domain in a sample grid
NEAREST = 3  # training images beside a translation
PROBED = 64  # that the diagnostics look at
TRANSLATED = 32  # at a time while evaluating
DIRECTIONS = (("A", "B", "G_A", "G_B"), ("B", "A", "G_B", "G_A"))  # from, to, there, back


class CycleGAN(Task):
    """Losses: adversarial, cycle consistency and identity, both ways.

    The generators take one step, then the discriminators `optim.d_steps`.
    """

    admitted_norms = ("instance", "batch", "group", "layer", "none")
    refusal = "image translation has no labels for a conditional norm"

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        assert isinstance(cfg.model, CycleGANConfig)
        self.model: CycleGANConfig = cfg.model
        self.batches_per_step = cfg.optim.d_steps
        if cfg.norm.name == "batch" and is_penalized(cfg.loss):
            raise RequestError(
                "norm=batch cannot work with loss.r1, loss.r2 or loss.gradient_penalty: they "
                "penalize the gradient of each image alone, and in the discriminator the batch's "
                "statistics mix the images; set them to 0 or choose norm= instance, group, layer, "
                "none"
            )
        super().__init__(cfg, device, num_classes)
        self.pools = {name: ImagePool(self.model.pool_size) for name in self.discriminators}

    def _build(self, spectral: bool = True) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
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
            name: PatchDiscriminator(
                channels,
                norm,
                width=m.d_width,
                layers=m.d_layers,
                spectral=spectral and m.d_spectral_norm,
            )
            for name in ("D_A", "D_B")
        }
        return generators, discriminators

    def _dry_run(
        self, generators: dict[str, nn.Module], discriminators: dict[str, nn.Module]
    ) -> None:
        data = self.cfg.data
        x = torch.empty(data.batch_size, data.channels, data.image_size, data.image_size)
        y = x
        for generator in generators.values():
            y = generator(x)
        if y.shape != x.shape:
            raise ValueError(
                f"images of {data.image_size} pixels come back as {y.shape[-1]}; data.image_size "
                f"must be a multiple of {2**self.model.downsamplings}"
            )
        for discriminator in discriminators.values():
            discriminator(x)

    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        pairs = [
            [batch["image"].to(self.device, non_blocking=True) for batch in each]
            for each in batches
        ]
        a, b = pairs[0]
        g_a, g_b = self.generators["G_A"], self.generators["G_B"]
        weight = self.model.cycle_weight

        self._freeze_discriminators(True)
        with self.autocast():
            fake_b, fake_a = g_a(a), g_b(b)
            gan_a, gan_b = self._fooling("D_A", fake_b, b), self._fooling("D_B", fake_a, a)
            cycle_a, cycle_b = l1_loss(g_b(fake_b), a), l1_loss(g_a(fake_a), b)
            loss = gan_a + gan_b + weight * (cycle_a + cycle_b)
            losses = {"G_A": gan_a, "G_B": gan_b, "cycle_A": cycle_a, "cycle_B": cycle_b}
            if self.model.identity_weight > 0:
                identity_a, identity_b = l1_loss(g_a(b), b), l1_loss(g_b(a), a)
                loss = loss + weight * self.model.identity_weight * (identity_a + identity_b)
                losses |= {"identity_A": identity_a, "identity_B": identity_b}
        losses["balance/gradient_G"] = self._descend("G", loss)

        self._freeze_discriminators(False)
        for number, (a, b) in enumerate(pairs):
            if number > 0:
                with torch.no_grad(), self.autocast():
                    fake_b, fake_a = g_a(a), g_b(b)
            sides = {
                name: (partial(self._judge, name), real, self.pools[name].query(fake.detach()))
                for name, real, fake in (("D_A", b, fake_b), ("D_B", a, fake_a))
            }
            losses |= self._train_discriminators(sides)
        return {name: value.detach() for name, value in losses.items()}

    def _judge(self, name: str, *images: Tensor) -> list[Tensor]:
        # One pass for each: a batch norm must not see real and fake together.
        return [self.discriminators[name](self._augment(each)) for each in images]

    def _fooling(self, name: str, fake: Tensor, real: Tensor) -> Tensor:
        """The generator's loss for translations `fake` into the domain of `real`."""
        kind = self.cfg.loss.gan.name
        (logits,) = self._judge(name, fake)
        real_logits = self._judge(name, real)[0] if kind == "relativistic" else None
        return generator_loss(logits, kind, real_logits)

    # ---- evaluation

    def prepare_evaluation(self, data: Data) -> None:
        self.data = data
        self.references = build_references(self.cfg.metrics, data, self.device)
        self.probed = [fetch_all(source, PROBED)["image"].to(self.device) for source in data.test]
        self.shown = [images[:SHOWN] for images in self.probed]

    def judge(self, generators: dict[str, nn.Module], brief: bool) -> Judged:
        """Translations of the held-out images and, unless brief, what comes back of them."""
        out, looked_at = {}, {}
        for here, (source, target, there, back) in enumerate(DIRECTIONS):
            come = None if brief else generators[back]
            scores, seen = self._translated(here, generators[there], come)
            for name, value in scores.items():
                out[f"{name}_{source if 'cycle' in name else f'{source}to{target}'}"] = value
            if seen is not None:
                reference, way = self.references[1 - here], f"{source}to{target}"
                out |= suffixed(reference.compare(seen), way)
                looked_at[f"_{way}"] = (reference, seen)
        return Judged(out, looked_at)

    def _translated(
        self, here: int, go: Callable[[Tensor], Tensor], come: Callable[[Tensor], Tensor] | None
    ) -> tuple[dict[str, float], Seen | None]:
        """The held-out images of domain `here` through `go` (and `come`): what pairs of images
        tell, averaged, and what is seen of the translations."""
        test, target = self.data.test[here], self.data.test[1 - here]
        scores: dict[str, list[Tensor]] = {}
        parts: list[Seen] = []

        def add(pairs: dict[str, Tensor]) -> None:
            for name, values in pairs.items():
                scores.setdefault(name, []).append(values.double())

        for index in evenly(len(test), self._count(here)).split(TRANSLATED):
            batch = test.fetch(index.tolist(), torch.Generator())
            images = batch["image"].to(self.device)
            translated = go(images)
            if come is not None:
                again = come(translated)
                add({"cycle_l1": (again - images).abs().mean((1, 2, 3))})
                add({f"cycle_{name}": v for name, v in _likeness(again, images).items()})
            if self.references:
                labels = batch["label"].to(self.device) if "label" in batch else None
                parts.append(self.references[1 - here].observe(translated, labels))
            if self.data.counterparts:
                true = target.fetch(index.tolist(), torch.Generator())["image"].to(self.device)
                reader = self.references[1 - here].reader
                assert reader is not None
                distance = feature_distance(reader.maps(translated), reader.maps(true))
                add(_likeness(translated, true) | {"feature_distance": distance})
        means = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
        return means, Seen.joined(parts) if parts else None

    def _count(self, here: int) -> int:
        """How many held-out images of domain `here` are translated."""
        return min(len(self.data.test[here]), self.cfg.metrics.samples or MOST_GENERATED)

    def protocol(self) -> dict[str, Any]:
        found = super().protocol()
        for here, (_, target, _, _) in enumerate(DIRECTIONS if self.references else ()):
            found[target]["generated"] = self._count(here)
        return found

    def standing_forwards(self, name: str, net: nn.Module, count: int) -> list[Callable[[], Any]]:
        domain = [there for _, _, there, _ in DIRECTIONS].index(name)
        size, seed = self.cfg.data.batch_size, self.cfg.seed
        own = [self.data.domains[domain]]
        found = batches(own, batch_size=size, start=0, stop=count, seed=seed)
        images = [batch["image"].to(self.device) for (batch,) in found]
        return [partial(net, x) for x in images]

    @torch.no_grad()
    def reference_figures(self) -> dict[str, float]:
        """The floor and the ceiling: real held-out images, and untranslated ones."""
        out: dict[str, float] = {}
        for here, (source, target, _, _) in enumerate(DIRECTIONS if self.references else ()):
            reference = self.references[1 - here]
            scores, seen = self._translated(here, lambda images: images, None)
            assert seen is not None
            untranslated = scores | reference.compare(seen)
            for kind, figures in (
                ("untranslated", untranslated), ("real", reference.compare(reference.held_out)),
            ):  # fmt: skip
                out |= suffixed(figures, f"{source}to{target}_{kind}")
        return out

    def probes(self) -> dict[str, Probe]:
        """Translations should be bright and dark with their counterparts; else their originals."""
        found = {}
        for here, (source, target, there, _) in enumerate(DIRECTIONS):
            originals, real = self.probed[here], self.probed[1 - here]
            images = in_chunks(self.averaged[there], originals, size=TRANSLATED)
            like = real if self.data.counterparts else originals
            found[f"_{source}to{target}"] = Probe(images, real, like=like)
        return found

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

    @torch.no_grad()
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """For each direction, columns of: original, translation, and the training images of the
        other domain that are nearest to it."""
        shown = {}
        for here, (source, target, there, _) in enumerate(DIRECTIONS if self.references else ()):
            reference, images = self.references[1 - here], self.shown[here]
            fake = self.averaged[there](images)
            nearest = reference.nearest(reference.observe(fake).features, NEAREST)
            rows = torch.cat([torch.stack([images, fake]), nearest.to(self.device).transpose(0, 1)])
            name = f"neighbours/{source}_to_{target}_above_nearest_training_images"
            shown[name] = (rows.flatten(0, 1), len(images))
        return shown

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        pools = {name: pool.state_dict() for name, pool in self.pools.items()}
        return {**super().state_dict(), "pools": pools}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, pool in self.pools.items():
            pool.load_state_dict(state["pools"][name])


def _likeness(images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """PSNR and, where its window fits, SSIM of each pair."""
    out = {"psnr": psnr(images, target)}
    return out | {"ssim": ssim(images, target)} if images.shape[-1] >= SMALLEST else out
