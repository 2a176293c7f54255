"""The reference CycleGAN code's networks as that code lays them out, in plain torch."""

from pathlib import Path

import torch
from torch import nn


def norm_layer(kind: str, channels: int) -> nn.Module:
    """kind: instance, batch, or old: instance norms with statistics, as torch 0.3 saved them."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.InstanceNorm2d(channels, track_running_stats=kind == "old")


class Block(nn.Module):
    def __init__(self, c: int, kind: str, dropout: bool) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3, bias=kind != "batch")]
        layers += [norm_layer(kind, c), nn.ReLU(True)]
        if dropout:
            layers.append(nn.Dropout(0.5))
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3, bias=kind != "batch")]
        self.conv_block = nn.Sequential(*layers, norm_layer(kind, c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    def __init__(
        self, kind: str, blocks: int, dropout: bool = False, width: int = 4, channels: int = 3
    ) -> None:
        super().__init__()
        bias = kind != "batch"
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7, bias=bias)]
        layers += [norm_layer(kind, width), nn.ReLU(True)]
        for c in (width, 2 * width):
            layers += [nn.Conv2d(c, 2 * c, 3, 2, 1, bias=bias)]
            layers += [norm_layer(kind, 2 * c), nn.ReLU(True)]
        layers += [Block(4 * width, kind, dropout) for _ in range(blocks)]
        for c in (2 * width, width):
            layers += [nn.ConvTranspose2d(2 * c, c, 3, 2, 1, output_padding=1, bias=bias)]
            layers += [norm_layer(kind, c), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Discriminator(nn.Module):
    def __init__(self, kind: str, layers: int = 3, width: int = 4, channels: int = 3) -> None:
        super().__init__()
        made: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        c = width
        for n in range(1, layers + 1):
            out = width * min(2**n, 8)
            made.append(nn.Conv2d(c, out, 4, 2 if n < layers else 1, 1, bias=kind != "batch"))
            made += [norm_layer(kind, out), nn.LeakyReLU(0.2, True)]
            c = out
        self.model = nn.Sequential(*made, nn.Conv2d(c, 1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """With weights and statistics as if trained, all of a size that shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.is_floating_point():
            center = 1.0 if value.dim() == 1 and name.endswith("weight") else 0.0
            value.normal_(center, 0.15, generator=generator)
        else:
            value.fill_(7)
    return net.eval()


def plain(net: nn.Module) -> nn.Module:
    """`net`, whose instance norms use the image's own statistics: as the reference code, which
    drops those of old files, runs it."""
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return net


def save(net: nn.Module, path: Path, prefix: str = "", old: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {prefix + key: value.clone() for key, value in net.state_dict().items()}
    torch.save(state, path, _use_new_zipfile_serialization=not old)


def four(folder: Path, kind: str = "instance", blocks: int = 1, **sizes: int) -> dict:
    """A folder as a run of the reference code leaves it, and its networks by name."""
    nets: dict[str, nn.Module] = {}
    for number, name in enumerate(("G_A", "G_B", "D_A", "D_B")):
        net = Generator(kind, blocks, **sizes) if name[0] == "G" else Discriminator(kind, **sizes)
        nets[name] = trained(net, number)
        save(nets[name], folder / f"latest_net_{name}.pth")
    return nets
