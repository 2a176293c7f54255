"""Adversarial losses on discriminator logits (`LOSSES`), gradient penalties, and the image pool.

A loss of one's own is an entry more: `LOSSES["mine"] = Loss(discriminator, generator)`; it is then
a choice of `loss.gan`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gannorm.parallel import drawn, gathered, own
from gannorm.schema import LossConfig

# Batches of images to as many tensors of logits.
Critic = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Loss:
    """A loss of logits for real and for generated images, float32.

    Attributes:
        discriminator: (real, fake) to what the discriminator minimizes.
        generator: (fake, real) to what the generator minimizes.
        paired: no logit is right by itself, only real and fake in pairs: which one is larger.
        needs_real: the generator's loss looks at `real`; None is given otherwise.
        bounded: works without a penalty on the discriminator's gradient.
        middle: the logit between real and fake, where they are not paired.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor | None], Tensor]
    paired: bool = False
    needs_real: bool = False
    bounded: bool = True
    middle: float = 0.0


def _relativistic(fake: Tensor, real: Tensor | None) -> Tensor:
    assert real is not None
    return F.softplus(real - fake).mean()


LOSSES: dict[str, Loss] = {
    # Mao et al., 2017: halved for the discriminator, as in CycleGAN.
    "lsgan": Loss(
        lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
        lambda fake, _: (fake - 1).square().mean(),
        middle=0.5,
    ),
    # Lim and Ye, 2017.
    "hinge": Loss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda fake, _: -fake.mean(),
    ),
    # Goodfellow et al., 2014: cross-entropy.
    "nonsaturating": Loss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake, _: F.softplus(-fake).mean(),
    ),
    # Arjovsky et al., 2017: the difference of the means, for a penalized critic.
    "wgan": Loss(
        lambda real, fake: fake.mean() - real.mean(),
        lambda fake, _: -fake.mean(),
        paired=True,
        bounded=False,
    ),
    # Jolicoeur-Martineau, 2019; Huang et al., 2024: sample i, at each place of its logits, with
    # sample i.
    "relativistic": Loss(
        lambda real, fake: F.softplus(fake - real).mean(),
        _relativistic,
        paired=True,
        needs_real=True,
    ),
}


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the discriminator minimizes, given its logits for real and generated images.

    kind: a name in `LOSSES`.
    """
    return LOSSES[kind].discriminator(real.float(), fake.float())


def generator_loss(fake: Tensor, kind: str, real: Tensor | None = None) -> Tensor:
    """What the generator minimizes, given the discriminator's logits for its images.

    real: logits for as many real images, where `LOSSES[kind].needs_real`.
    """
    return LOSSES[kind].generator(fake.float(), None if real is None else real.float())


def discriminator_accuracy(real: Tensor, fake: Tensor, kind: str) -> dict[str, Tensor]:
    """The shares of `real` and of `fake` logits on their own side; of a paired loss, the share of
    `pairs` in order."""
    loss = LOSSES[kind]
    if loss.paired:
        return {"pairs": (real > fake).float().mean()}
    return {
        "real": (real > loss.middle).float().mean(),
        "fake": (fake < loss.middle).float().mean(),
    }


def input_gradients(logits: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    """dD(x)/dx of each sample x, (N, C*H*W) for each batch (N, C, H, W); differentiable.

    D(x) is the mean of a sample's logits, so that the size of a logit map does not matter.
    """
    scores = [each.float().reshape(len(each), -1).mean(1).sum() for each in logits]
    gradients = torch.autograd.grad(scores, images, create_graph=True)
    return [gradient.flatten(1) for gradient in gradients]


def is_penalized(cfg: LossConfig) -> bool:
    return max(cfg.r1, cfg.r2, cfg.gradient_penalty) > 0


def discriminator_objective(
    critic: Critic, real: Tensor, fake: Tensor, cfg: LossConfig
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The discriminator's loss, its penalty, and the logits for `real` and `fake` (N, C, H, W).

    critic: with penalties, a sample's logits must depend on that sample alone, and this must run
        outside of autocast: they are float32.

    Penalties: r1/2 * E||dD(x)/dx||^2 on real images, r2/2 on generated ones (Mescheder et al.,
    2018), and gradient_penalty * E(||dD(x)/dx|| - 1)^2 between them (Gulrajani et al., 2017).
    """
    real, fake = real.detach().float(), fake.detach().float()
    weights = ((cfg.r1, real), (cfg.r2, fake))
    for weight, images in weights:
        images.requires_grad_(weight > 0)
    logits = critic(real, fake)
    penalty = torch.zeros((), device=real.device)
    wanted = [(w, z, x) for (w, x), z in zip(weights, logits, strict=True) if w > 0]
    if wanted:
        factors, outputs, inputs = zip(*wanted, strict=True)
        for weight, gradient in zip(factors, input_gradients(outputs, inputs), strict=True):
            penalty = penalty + weight / 2 * gradient.square().sum(1).mean()
    if cfg.gradient_penalty > 0:
        share = drawn(lambda n: torch.rand(n, 1, 1, 1, device=real.device), len(real))
        between = torch.lerp(fake.detach(), real.detach(), share).requires_grad_()
        (gradient,) = input_gradients(critic(between), [between])
        penalty = penalty + cfg.gradient_penalty * (gradient.norm(dim=1) - 1).square().mean()
    loss = discriminator_loss(logits[0], logits[1], cfg.gan)
    return loss, penalty, (logits[0], logits[1])


class ImagePool:
    """Past translations, half of which stand in for new ones (Shrivastava et al., 2017).

    Each image of a batch is, with probability 1/2, swapped for a random one of the `size` in the
    pool; a pool of size 0 passes everything through. Draws on torch's CPU generator. Several
    processes have the same pool: each sees the images of all, as one process would.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: Tensor | None = None  # (filled, C, H, W)
        self.given: list[Tensor] = []  # what `choices` of the next queries were, on the device

    @property
    def is_full(self) -> bool:
        return self.size == 0 or (self.images is not None and len(self.images) == self.size)

    def choices(self, count: int) -> Tensor:
        """By each of `count` images the place that it takes in the pool; -1: none (int64)."""

        def choose() -> int:
            return int(torch.randint(self.size, ())) if torch.rand(()) < 0.5 else -1

        return torch.tensor([choose() for _ in range(count)], dtype=torch.int64)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """As many images (N, C, H, W) as came in: new ones or older ones."""
        if self.size == 0:
            return images
        images = gathered(images.detach())
        kept = images.nan_to_num(0.0, 1.0, -1.0)  # what a skipped step made does not come back
        if self.images is not None:
            self.images = self.images.to(images.device)  # loaded on the CPU
        filled = 0 if self.images is None else len(self.images)
        free = min(self.size - filled, len(images))
        if free:
            new = kept[:free].clone()
            self.images = new if self.images is None else torch.cat([self.images, new])
        assert self.images is not None
        if self.given:
            return self._swapped(images, kept, self.given.pop(0))
        out = images.clone()
        for i, k in enumerate(self.choices(len(images) - free).tolist(), free):
            if k >= 0:
                out[i] = self.images[k]
                self.images[k] = kept[i]
        return out[own(len(out))]

    def _swapped(self, images: Tensor, kept: Tensor, choices: Tensor) -> Tensor:
        """Of a full pool, by `choices` that the host does not look at: a CUDA graph's."""
        assert self.images is not None
        out = []
        for i, choice in enumerate(choices.split(1)):
            place, swapped = choice.clamp_min(0), (choice >= 0).view(1, 1, 1, 1)
            there = self.images.index_select(0, place)
            out.append(torch.where(swapped, there, images[i : i + 1]))
            self.images.index_copy_(0, place, torch.where(swapped, kept[i : i + 1], there))
        return torch.cat(out)

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.images = state["images"]
