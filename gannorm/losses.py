"""Adversarial losses on discriminator logits, and the image pool."""

import torch
from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """What the discriminator minimizes, given its logits for real and generated images.

    kind: "lsgan" (Mao et al., 2017): the mean of (real - 1)^2 and fake^2, halved as in CycleGAN;
        "hinge" (Lim and Ye, 2017).
    """
    real, fake = real.float(), fake.float()
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: Tensor, kind: str) -> Tensor:
    """What the generator minimizes, given the discriminator's logits for its images."""
    fake = fake.float()
    return (fake - 1).square().mean() if kind == "lsgan" else -fake.mean()


class ImagePool:
    """Past translations, half of which stand in for new ones (Shrivastava et al., 2017).

    Each image of a batch is, with probability 1/2, swapped for a random one of the `size` in the
    pool; a pool of size 0 passes everything through. Draws on torch's CPU generator.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images: Tensor | None = None  # (filled, C, H, W)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """As many images (N, C, H, W) as came in: new ones or older ones."""
        if self.size == 0:
            return images
        images = images.detach()
        if self.images is not None:
            self.images = self.images.to(images.device)  # loaded on the CPU
        filled = 0 if self.images is None else len(self.images)
        free = min(self.size - filled, len(images))
        if free:
            new = images[:free].clone()
            self.images = new if self.images is None else torch.cat([self.images, new])
        assert self.images is not None
        out = images.clone()
        for i in range(free, len(images)):
            if torch.rand(()) < 0.5:
                k = int(torch.randint(self.size, ()))
                out[i] = self.images[k]
                self.images[k] = images[i]
        return out

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.images = state["images"]
