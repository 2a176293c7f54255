"""Generators of CycleGAN as training leaves them, for tests of what is done with them."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from gannorm.config import typed
from gannorm.models import ResnetGenerator
from gannorm.models.norm_factory import build_norm

ROOT = Path(__file__).parents[1]


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides)


def generator(*overrides, channels=(3, 3)) -> ResnetGenerator:
    """Weights and running statistics as after some training, evaluated."""
    cfg = typed(config("model.width=8", "model.blocks=2", *overrides))
    torch.manual_seed(0)
    net = ResnetGenerator(
        *channels, build_norm(cfg.norm), width=8, blocks=2, dropout=cfg.model.dropout,
        downsamplings=cfg.model.downsamplings,
    )  # fmt: skip
    scale = 2.0 if cfg.norm.name == "none" else 1.0
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                size = (module.weight[0].numel() if isinstance(module, nn.Conv2d) else 72) ** -0.5
                module.weight.normal_(0, scale * size)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.5)
        for _ in range(30):  # the running statistics of a batch norm
            net.train()(torch.rand(2, channels[0], 32, 32) * 2 - 1)
    return net.eval()
