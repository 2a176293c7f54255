"""CycleGAN's networks (Zhu et al., 2017), weight for weight those of the reference PyTorch code.

Where a norm has its activation fused in, or a convolution its reflection padding, an `nn.Identity`
holds that one's place in the `nn.Sequential`, so that the state_dict keys are the reference's.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from gannorm import parallel
from gannorm.models.convolution import Conv2d
from gannorm.models.norm_factory import NormFactory, apply_norm
from gannorm.models.resblock import spectrally_normalize
from gannorm.norms.layers import BatchNorm2d, InstanceNorm2d


class Dropout(nn.Dropout):
    """torch's, drawn for the samples of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * parallel.drawn(partial(self._draw, x), len(x)) if self.training else x

    def _draw(self, x: Tensor, count: int) -> Tensor:
        kept = torch.rand(count, *x.shape[1:], device=x.device) >= self.p
        return kept.to(x.dtype) / (1 - self.p)


class ResnetBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), reflection-padded; the add is fused into the norm."""

    def __init__(self, channels: int, norm: NormFactory, dropout: bool) -> None:
        super().__init__()
        bias = norm.conv_bias
        self.conv_block = nn.Sequential(
            nn.Identity(),
            Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=bias),
            norm(channels, activation="relu"),
            nn.Identity(),
            *([Dropout(0.5)] if dropout else []),
            nn.Identity(),
            Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=bias),
            norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return apply_norm(self.conv_block[-1], self.conv_block[:-1](x), None, residual=x)


class ResnetGenerator(nn.Module):
    """Downsampling, residual blocks, upsampling: (N, in_channels, H, W) -> the same size.

    Args:
        width: channels of the first layer (64 as published).
        blocks: residual blocks (9 for 256x256 images, 6 for 128x128).
        downsamplings: stride-2 convolutions (2); H and W must be multiples of 2**downsamplings.
        dropout: dropout of 0.5 inside the residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: NormFactory,
        *,
        width: int = 64,
        blocks: int = 9,
        downsamplings: int = 2,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        bias = norm.conv_bias
        layers: list[nn.Module] = [
            nn.Identity(),
            Conv2d(in_channels, width, 7, padding=3, padding_mode="reflect", bias=bias),
            norm(width, activation="relu"),
            nn.Identity(),
        ]
        for i in range(downsamplings):
            c = width * 2**i
            layers += [
                nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=bias),
                norm(2 * c, activation="relu"),
                nn.Identity(),
            ]
        c = width * 2**downsamplings
        layers += [ResnetBlock(c, norm, dropout) for _ in range(blocks)]
        for i in reversed(range(downsamplings)):
            c = width * 2**i
            layers += [
                nn.ConvTranspose2d(2 * c, c, 3, stride=2, padding=1, output_padding=1, bias=bias),
                norm(c, activation="relu"),
                nn.Identity(),
            ]
        last = Conv2d(width, out_channels, 7, padding=3, padding_mode="reflect")
        layers += [nn.Identity(), last, nn.Tanh()]
        self.model = nn.Sequential(*layers)
        init_weights(self)
        freeze_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PatchDiscriminator(nn.Module):
    """PatchGAN: a map of real/fake logits, one for each overlapping patch of the input.

    Args:
        width: channels of the first layer (64 as published).
        layers: stride-2 convolutions; 3 gives patches of 70x70 pixels, 2 of 34x34.
        spectral: spectral norm on every convolution.
    """

    def __init__(
        self,
        in_channels: int,
        norm: NormFactory,
        *,
        width: int = 64,
        layers: int = 3,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        bias = norm.conv_bias
        model: list[nn.Module] = [
            Conv2d(in_channels, width, 4, stride=2, padding=1, twice=True),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        c = width
        for i in range(1, layers + 1):
            out = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            model += [
                Conv2d(c, out, 4, stride=stride, padding=1, bias=bias, twice=True),
                norm(out, activation="leaky_relu", negative_slope=0.2),
                nn.Identity(),
            ]
            c = out
        model.append(Conv2d(c, 1, 4, padding=1, twice=True))
        self.model = nn.Sequential(*model)
        init_weights(self)
        freeze_biases(self)
        if spectral:
            spectrally_normalize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def freeze_biases(net: nn.Module) -> None:
    """Those of convolutions right before a norm that takes each channel's mean off: whatever they
    are changes nothing, their gradient is rounding, and Adam makes steps of full length of it."""
    for layers in net.modules():
        if isinstance(layers, nn.Sequential):
            for layer, behind in pairwise(layers):
                bias = getattr(layer, "bias", None)
                if bias is not None and isinstance(behind, InstanceNorm2d | BatchNorm2d):
                    bias.requires_grad_(False)


def init_weights(net: nn.Module) -> None:
    """As the reference: convolutions N(0, 0.02), norm weights N(1, 0.02), biases 0.

    A norm that was given a `weight_init` keeps it.
    """
    for module in net.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None:
            convolution = isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            given = getattr(module, "weight_init", None)
            nn.init.normal_(weight, *((0.0, 0.02) if convolution else given or (1.0, 0.02)))
        if bias is not None:
            nn.init.zeros_(bias)
