"""The norms a config can name: `NORMS`, and `build_norm`, which makes a model's layers of one.

A norm of one's own is an entry more: `NORMS["mine"] = Norm(config, build, statistics)`, and a file
`conf/norm/mine.yaml` with the values of its config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gannorm.norms.base import NoNorm
from gannorm.norms.layers import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm2d,
)
from gannorm.schema import (
    BatchNormConfig,
    GroupNormConfig,
    InstanceNormConfig,
    LayerNormConfig,
    NoNormConfig,
    NormConfig,
)


@dataclass(frozen=True)
class Norm:
    """A norm that a config can name.

    Attributes:
        config: the class of its section.
        build: (config, channels, num_classes, **epilogue) to a layer; the epilogue: activation,
            negative_slope, residual_after_activation.
        statistics: over what a mean is taken: the sample (or a part of it), the batch, nothing.
        unconditional: of a norm whose affine is picked by class, the name of the same without.
    """

    config: type[NormConfig]
    build: Callable[..., nn.Module]
    statistics: Literal["sample", "batch", "none"]
    unconditional: str | None = None


def _plain(kind: Callable[..., Any]) -> Callable[..., nn.Module]:
    """The layers of one of our classes without labels."""

    def build(cfg: Any, channels: int, num_classes: int | None, **epilogue: Any) -> nn.Module:
        return _started(kind(channels, affine=cfg.affine, **_arguments(cfg), **epilogue), cfg)

    return build


def _by_class(kind: Callable[..., Any]) -> Callable[..., nn.Module]:
    """The layers of one of our classes with a table for each class."""

    def build(cfg: Any, channels: int, num_classes: int, **epilogue: Any) -> nn.Module:
        return _started(kind(channels, num_classes, **_arguments(cfg), **epilogue), cfg)

    return build


def _group(cfg: GroupNormConfig, channels: int, _: int | None, **epilogue: Any) -> nn.Module:
    groups = min(cfg.num_groups, channels)
    return GroupNorm(groups, channels, affine=cfg.affine, **_arguments(cfg), **epilogue)


def _arguments(cfg: LayerNormConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"eps": cfg.eps}
    if cfg.weight_init is not None:
        arguments["weight_init"] = tuple(cfg.weight_init)
    if isinstance(cfg, BatchNormConfig):
        arguments |= {"momentum": cfg.momentum, "var_estimator": cfg.var_estimator}
    return arguments


def _started(layer: Any, cfg: LayerNormConfig) -> nn.Module:
    if isinstance(cfg, BatchNormConfig):
        layer.running_var.fill_(cfg.running_var_init)
    return layer


NORMS: dict[str, Norm] = {
    "instance": Norm(InstanceNormConfig, _plain(InstanceNorm2d), "sample"),
    "conditional_instance": Norm(
        InstanceNormConfig, _by_class(ConditionalInstanceNorm2d), "sample", "instance"
    ),
    "batch": Norm(BatchNormConfig, _plain(BatchNorm2d), "batch"),
    "conditional_batch": Norm(BatchNormConfig, _by_class(ConditionalBatchNorm2d), "batch", "batch"),
    "group": Norm(GroupNormConfig, _group, "sample"),
    "layer": Norm(LayerNormConfig, _plain(LayerNorm2d), "sample"),
    "none": Norm(NoNormConfig, lambda cfg, channels, classes, **e: NoNorm(**e), "none"),
}


@dataclass(frozen=True)
class NormFactory:
    """Makes a model's norm layers of one kind.

    `factory(channels, activation=...)` is a layer; call it with `apply_norm`.
    """

    norm: Norm
    config: NormConfig
    num_classes: int | None = None

    @property
    def conditional(self) -> bool:
        return self.norm.unconditional is not None

    @property
    def conv_bias(self) -> bool:
        """Whether a convolution before this norm needs a bias: the norm then adds none."""
        return not getattr(self.config, "affine", self.norm.statistics != "none")

    def unconditional(self) -> "NormFactory":
        name = self.norm.unconditional
        return self if name is None else NormFactory(NORMS[name], self.config)

    def __call__(
        self,
        channels: int,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
    ) -> nn.Module:
        return self.norm.build(
            self.config, channels, self.num_classes, activation=activation,
            negative_slope=negative_slope, residual_after_activation=residual_after_activation,
        )  # fmt: skip


def build_norm(cfg: NormConfig, num_classes: int | None = None) -> NormFactory:
    """The factory for a config's `norm` section.

    Args:
        num_classes: rows of the tables of a conditional norm.

    Raises:
        ValueError: a conditional norm without `num_classes`.
    """
    factory = NormFactory(NORMS[cfg.name], cfg, num_classes)
    if factory.conditional and num_classes is None:
        raise ValueError(f"norm={cfg.name} needs labelled data (num_classes is None)")
    return factory


def apply_norm(
    norm: nn.Module, x: Tensor, labels: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """Call a layer that a factory made, with labels if it is conditional."""
    if isinstance(norm, ConditionalBatchNorm2d | ConditionalInstanceNorm2d):
        return norm(x, labels, residual=residual)
    return norm(x, residual=residual)
