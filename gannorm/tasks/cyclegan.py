"""CycleGAN (Zhu et al., 2017): unpaired image translation.

G_A translates A to B and G_B back; D_A judges domain B, D_B domain A (the reference's names).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from gannorm.data import Batch
from gannorm.data.files import MULTIPLE
from gannorm.errors import RequestError
from gannorm.models import PatchDiscriminator, ResnetGenerator
from gannorm.models.norm_factory import NORMS, Norm, build_norm
from gannorm.schema import Config, CycleGANConfig
from gannorm.tasks.losses import LOSSES, ImagePool, generator_loss, is_penalized
from gannorm.tasks.task import Networks, Sides, Task, averaged


class CycleGAN(Task):
    """Losses: adversarial, cycle consistency and identity, both ways.

    The generators take one step, then the discriminators `optim.d_steps`.
    """

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        assert isinstance(cfg.model, CycleGANConfig)
        self.model: CycleGANConfig = cfg.model
        self.batches_per_step = cfg.optim.d_steps * cfg.trainer.grad_accum
        super().__init__(cfg, device, num_classes)
        self.pools = {name: ImagePool(self.model.pool_size) for name in self.discriminators}

    @classmethod
    def refusal(cls, norm: Norm, cfg: Config) -> str:
        if norm.unconditional is not None:
            return f"model={cfg.model.name}: image translation has no labels for a conditional norm"
        if norm.statistics == "batch" and is_penalized(cfg.loss):
            return (
                "loss.r1, loss.r2 or loss.gradient_penalty: they penalize the gradient of each "
                "image alone, and in the discriminator the batch's statistics mix the images; set "
                "them to 0"
            )
        return ""

    def _check_request(self) -> None:
        super()._check_request()
        data, m = self.cfg.data, self.model
        if data.channel_pair[0] != data.channel_pair[1] and m.identity_weight > 0:
            raise RequestError(
                f"data.channels={data.channels}: the identity loss shows G_A images of B, which "
                "have other channels; set model.identity_weight=0"
            )
        if getattr(data, "preprocess", "") == "none" and 2**m.downsamplings > MULTIPLE:
            raise RequestError(
                f"data.preprocess=none makes sides multiples of {MULTIPLE}, and "
                f"model.downsamplings={m.downsamplings} needs multiples of {2**m.downsamplings}; "
                "choose another data.preprocess="
            )

    def _build(self, spectral: bool = True) -> tuple[Networks, Networks]:
        m, (a, b) = self.model, self.cfg.data.channel_pair
        norm = build_norm(self.cfg.norm)
        generators: Networks = {
            name: ResnetGenerator(
                source, target, norm, width=m.width, blocks=m.blocks,
                downsamplings=m.downsamplings, dropout=m.dropout,
            )
            for name, source, target in (("G_A", a, b), ("G_B", b, a))
        }  # fmt: skip
        discriminators: Networks = {
            name: PatchDiscriminator(
                channels,
                norm,
                width=m.d_width,
                layers=m.d_layers,
                spectral=spectral and m.d_spectral_norm,
            )
            for name, channels in (("D_A", b), ("D_B", a))
        }
        return generators, discriminators

    def _dry_run(self, generators: Networks, discriminators: Networks) -> None:
        data = self.cfg.data
        a, b = (torch.empty(data.whole_batch, c, *data.size) for c in data.channel_pair)
        for name, x in (("G_A", a), ("G_B", b)):
            back = tuple(generators[name](x).shape[-2:])
            if back != data.size:
                raise ValueError(
                    f"images of {data.size[0]}x{data.size[1]} pixels come back as "
                    f"{back[0]}x{back[1]}; data.image_size must be a multiple of "
                    f"{2**self.model.downsamplings}"
                )
        discriminators["D_A"](b)
        discriminators["D_B"](a)

    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        pairs = [(self.on_device(a["image"]), self.on_device(b["image"])) for a, b in batches]
        n, found, made = self.parts, list[dict[str, Tensor]](), list[tuple[Tensor, Tensor]]()

        self._freeze_discriminators(True)
        gradient = self._descend("G", (self._translate(*pair, found, made) for pair in pairs[:n]))
        losses = averaged(found) | {"balance/gradient_G": gradient}

        self._freeze_discriminators(False)
        for first in range(0, len(pairs), n):
            fakes = [None] * n if first else made
            each = zip(pairs[first : first + n], fakes, strict=True)
            losses |= self._train_discriminators(self._sides(*pair, fake) for pair, fake in each)
        return {name: value.detach() for name, value in losses.items()}

    def _translate(
        self, a: Tensor, b: Tensor, found: list[dict[str, Tensor]],
        made: list[tuple[Tensor, Tensor]],
    ) -> Tensor:  # fmt: skip
        """What the generators minimize; its terms go to `found`, the translations to `made`."""
        g_a, g_b = self.generators["G_A"], self.generators["G_B"]
        weight, identity = self.model.cycle_weight, self.model.identity_weight > 0
        with self.autocast():
            fake_b, *same_b = self._passed(g_a, a, *[b] * identity)
            fake_a, back_a, *same_a = self._passed(g_b, b, fake_b, *[a] * identity)
            (back_b,) = self._passed(g_a, fake_a)
            gan_a, gan_b = self._fooling("D_A", fake_b, b), self._fooling("D_B", fake_a, a)
            cycle_a, cycle_b = l1_loss(back_a, a), l1_loss(back_b, b)
            loss = gan_a + gan_b + weight * (cycle_a + cycle_b)
            losses = {"G_A": gan_a, "G_B": gan_b, "cycle_A": cycle_a, "cycle_B": cycle_b}
            if identity:
                identity_a, identity_b = l1_loss(same_b[0], b), l1_loss(same_a[0], a)
                loss = loss + weight * self.model.identity_weight * (identity_a + identity_b)
                losses |= {"identity_A": identity_a, "identity_B": identity_b}
        found.append(losses)
        made.append((fake_b.detach(), fake_a.detach()))
        return loss

    def _sides(self, a: Tensor, b: Tensor, made: tuple[Tensor, Tensor] | None) -> Sides:
        """What the discriminators are shown; translations that are not `made` yet are here."""
        if made is None:
            with torch.no_grad(), self.autocast():
                made = self.generators["G_A"](a), self.generators["G_B"](b)
        return {
            name: (partial(self._logits, name), real, self.pools[name].query(fake))
            for name, real, fake in (("D_A", b, made[0]), ("D_B", a, made[1]))
        }

    def _logits(self, name: str, *images: Tensor) -> list[Tensor]:
        return self._passed(lambda x: self.discriminators[name](self._augment(x)), *images)

    def _passed(self, net: Callable[[Tensor], Tensor], *images: Tensor) -> list[Tensor]:
        """What `net` makes of each batch: in one pass, unless that would mix them (a batch norm's
        statistics), or they differ in size."""
        apart = NORMS[self.cfg.norm.name].statistics == "batch" or self.model.dropout
        if apart or len({each.shape for each in images}) > 1:
            return [net(each) for each in images]
        return list(net(torch.cat(images)).chunk(len(images)))

    def _fooling(self, name: str, fake: Tensor, real: Tensor) -> Tensor:
        """The generator's loss for translations `fake` into the domain of `real`."""
        kind = self.cfg.loss.gan
        (logits,) = self._logits(name, fake)
        real_logits = self._logits(name, real)[0] if LOSSES[kind].needs_real else None
        return generator_loss(logits, kind, real_logits)

    # ---- what the host decides

    def is_settled(self) -> bool:
        return all(pool.is_full for pool in self.pools.values())

    def choices(self) -> list[Tensor]:
        if self.model.pool_size == 0:
            return []
        count = self.cfg.data.batch_size
        return [
            pool.choices(count) for _ in range(self.batches_per_step)
            for pool in self.pools.values()
        ]  # fmt: skip

    @contextmanager
    def choosing(self, choices: list[Tensor]) -> Iterator[None]:
        for number, pool in enumerate(self.pools.values()):
            pool.given = choices[number :: len(self.pools)]
        try:
            yield
        finally:
            for pool in self.pools.values():
                pool.given = []

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        pools = {name: pool.state_dict() for name, pool in self.pools.items()}
        return {**super().state_dict(), "pools": pools}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, pool in self.pools.items():
            pool.load_state_dict(state["pools"][name])
