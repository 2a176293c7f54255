"""The class-conditional ResBlock GAN: generator with conditional norms, projection discriminator.

`preact` is the block of SNGAN (Miyato et al., 2018) and BigGAN (Brock et al., 2019), `postact`
that of the TensorFlow tutorials. The discriminator is Miyato and Koyama's (2018).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gannorm.models.convolution import Conv2d
from gannorm.models.norm_factory import NormFactory, apply_norm
from gannorm.models.spectral import add_spectral_norm


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class PreactBlock(nn.Module):
    """norm, ReLU, upsample, conv3, norm, ReLU, conv3, plus a 1x1 shortcut; doubles H and W."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.norm1 = norm(in_channels, activation="relu")
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1, upsample=True)
        self.norm2 = norm(channels, activation="relu")
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        h = self.conv1(apply_norm(self.norm1, x, labels))
        h = self.conv2(apply_norm(self.norm2, h, labels))
        # A 1x1 convolution commutes with nearest upsampling and costs a quarter before it.
        return h + _up(self.shortcut(x))


class PostactBlock(nn.Module):
    """upsample, then conv3, norm, LeakyReLU(0.2) twice, plus the input.

    Where the channels change, the input passes conv1, norm, LeakyReLU(0.2) first.
    """

    def __init__(self, in_channels: int, channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1)
        self.norm1 = norm(channels, activation="leaky_relu")
        self.conv2 = Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels, activation="leaky_relu", residual_after_activation=True)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1)
            self.shortcut_norm = norm(channels, activation="leaky_relu")

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = _up(x)
        h = apply_norm(self.norm1, self.conv1(x), labels)
        skip = x
        if self.shortcut is not None:
            skip = apply_norm(self.shortcut_norm, self.shortcut(x), labels)
        return apply_norm(self.norm2, self.conv2(h), labels, residual=skip)


BLOCKS = {"preact": PreactBlock, "postact": PostactBlock}


class ResBlockGenerator(nn.Module):
    """Noise and labels to images: z (N, z_dim), labels (N,) -> (N, out_channels, S, S) in [-1, 1].

    Args:
        widths: channels at 4x4, then behind each block; S = 4 * 2**(len(widths) - 1).
        block: "preact" or "postact".
        num_classes: with an unconditional norm, the class enters as an embedding beside z. None:
            there are no classes.
        spectral: spectral norm on every convolution and linear layer.
        init: "orthogonal" (BigGAN), "xavier" (SNGAN) or "normal" (N(0, 0.02)).
    """

    def __init__(
        self,
        norm: NormFactory,
        *,
        num_classes: int | None,
        z_dim: int = 128,
        widths: Sequence[int] = (256, 256, 256, 256),
        block: str = "preact",
        out_channels: int = 3,
        spectral: bool = False,
        init: str = "orthogonal",
    ) -> None:
        super().__init__()
        self.z_dim, self.num_classes = z_dim, num_classes
        embedded = num_classes is not None and not norm.conditional
        self.embedding = nn.Embedding(num_classes or 0, z_dim) if embedded else None
        self.linear = nn.Linear(2 * z_dim if embedded else z_dim, widths[0] * 16)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nn.ModuleList([BLOCKS[block](a, b, norm) for a, b in pairs])
        last = widths[-1]
        plain = norm.unconditional()
        self.norm = plain(last, activation="relu") if block == "preact" else None
        self.conv = Conv2d(last, out_channels, 3, padding=1)
        init_weights(self, init)
        if spectral:
            spectrally_normalize(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(labels)], 1)
        h = self.linear(z).unflatten(1, (-1, 4, 4))
        for block in self.blocks:
            h = block(h, labels)
        if self.norm is not None:
            h = self.norm(h)
        return self.conv(h).tanh()


class DiscriminatorBlock(nn.Module):
    """ReLU, conv3, ReLU, conv3, plus a 1x1 shortcut; the first block has no leading ReLU."""

    def __init__(self, in_channels: int, channels: int, down: bool, first: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = Conv2d(in_channels, channels, 3, padding=1, relu=not first, twice=True)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, relu=True, pool=down, twice=True)
        learned = down or in_channels != channels
        self.shortcut = Conv2d(in_channels, channels, 1, twice=True) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.conv1(x))
        if self.down:
            x = F.avg_pool2d(x, 2)
        return h + (x if self.shortcut is None else self.shortcut(x))


class ProjectionDiscriminator(nn.Module):
    """Images (N, C, S, S) and labels (N,) to logits (N,): psi(phi(x)) + <embed(y), phi(x)>.

    Without classes (num_classes None) the plain psi(phi(x)).

    Args:
        widths: channels behind each block. downsamplings: how many blocks, from the first, halve.
        spectral: spectral norm on every layer.
    """

    def __init__(
        self,
        *,
        num_classes: int | None,
        in_channels: int = 3,
        widths: Sequence[int] = (128, 128, 128, 128),
        downsamplings: int = 2,
        spectral: bool = True,
        init: str = "orthogonal",
    ) -> None:
        super().__init__()
        ins = [in_channels, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(
                DiscriminatorBlock(a, b, down=i < downsamplings, first=i == 0)
                for i, (a, b) in enumerate(zip(ins, widths, strict=True))
            )
        )
        self.linear = nn.Linear(widths[-1], 1)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, widths[-1])
        init_weights(self, init)
        if spectral:
            spectrally_normalize(self)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        # There is no norm here to mind the layout, and convolutions are faster in this one.
        x = x.contiguous(memory_format=torch.channels_last)
        h = F.relu(self.blocks(x)).sum((2, 3))
        logits = self.linear(h).squeeze(1)
        return logits if self.embedding is None else logits + (self.embedding(labels) * h).sum(1)


def _layers(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]


def init_weights(net: nn.Module, init: str) -> None:
    """Initialize convolutions, linear layers and embeddings; biases are 0."""
    for module in _layers(net):
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        if init == "orthogonal":
            nn.init.orthogonal_(weight)
        elif init == "xavier":
            nn.init.xavier_uniform_(weight)
        else:
            nn.init.normal_(weight, 0.0, 0.02)
        if bias is not None:
            nn.init.zeros_(bias)


def spectrally_normalize(net: nn.Module) -> None:
    """Spectral norm on every layer with a weight matrix."""
    for module in _layers(net):
        add_spectral_norm(module)
