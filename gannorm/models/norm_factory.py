"""Norm layers from a config: `build_norm` turns the `norm` section of one into a `NormFactory`, the
only thing that the models know of norms.

Apart from `gannorm.norms.layers`, so that the layers can be imported where Hydra is not installed.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gannorm.config import (
    BatchNormConfig,
    GroupNormConfig,
    InstanceNormConfig,
    LayerNormConfig,
    NoNormConfig,
    NormConfig,
)
from gannorm.norms.base import NoNorm
from gannorm.norms.layers import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm2d,
)

CONDITIONAL = ("conditional_batch", "conditional_instance")


@dataclass(frozen=True)
class NormFactory:
    """Makes a model's norm layers of one kind.

    `factory(channels, activation=...)` is a layer; call it with `apply_norm`.
    """

    config: NormConfig
    num_classes: int | None = None
    conditional: bool = False

    @property
    def conv_bias(self) -> bool:
        """Whether a convolution before this norm needs a bias: the norm then adds none."""
        return not getattr(self.config, "affine", self.config.name != "none")

    def unconditional(self) -> "NormFactory":
        return replace(self, conditional=False)

    def __call__(
        self,
        channels: int,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
    ) -> nn.Module:
        cfg = self.config
        shared: dict[str, Any] = {
            "activation": activation,
            "negative_slope": negative_slope,
            "residual_after_activation": residual_after_activation,
        }
        if isinstance(cfg, NoNormConfig):
            return NoNorm(activation, negative_slope, residual_after_activation)
        assert isinstance(cfg, LayerNormConfig)  # the base of all the others
        shared["eps"] = cfg.eps
        if cfg.weight_init is not None:
            mean, std = cfg.weight_init
            shared["weight_init"] = (mean, std)
        if isinstance(cfg, BatchNormConfig):
            batch = {"momentum": cfg.momentum, "var_estimator": cfg.var_estimator.name, **shared}
            layer: BatchNorm2d | ConditionalBatchNorm2d = (
                ConditionalBatchNorm2d(channels, self.num_classes or 0, **batch)
                if self.conditional
                else BatchNorm2d(channels, affine=cfg.affine, **batch)
            )
            assert layer.running_var is not None
            layer.running_var.fill_(cfg.running_var_init)
            return layer
        if isinstance(cfg, InstanceNormConfig):
            if self.conditional:
                return ConditionalInstanceNorm2d(channels, self.num_classes or 0, **shared)
            return InstanceNorm2d(channels, affine=cfg.affine, **shared)
        if isinstance(cfg, GroupNormConfig):
            return GroupNorm(min(cfg.num_groups, channels), channels, affine=cfg.affine, **shared)
        return LayerNorm2d(channels, affine=cfg.affine, **shared)


def build_norm(cfg: NormConfig, num_classes: int | None = None) -> NormFactory:
    """The factory for a config's `norm` section.

    Args:
        num_classes: rows of the tables of a conditional norm.

    Raises:
        ValueError: a conditional norm without `num_classes`.
    """
    conditional = cfg.name in CONDITIONAL
    if conditional and num_classes is None:
        raise ValueError(f"norm={cfg.name} needs labelled data (num_classes is None)")
    return NormFactory(cfg, num_classes, conditional)


def apply_norm(
    norm: nn.Module, x: Tensor, labels: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Call a layer that a factory made, with labels if it is conditional."""
    if isinstance(norm, ConditionalBatchNorm2d | ConditionalInstanceNorm2d):
        return norm(x, labels, residual=residual)
    return norm(x, residual=residual)
