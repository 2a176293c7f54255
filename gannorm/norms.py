"""The norm layers: torch's constructors and state_dict keys, plus a fused epilogue.

    norm = InstanceNorm2d(64, activation="relu")            # norm and ReLU in one kernel
    norm = ConditionalBatchNorm2d(64, num_classes=10)
    y = norm(x);  y = norm(x, labels);  y = norm(x, residual=skip)

`build_norm` turns the `norm` section of a config into a `NormFactory`, the only thing that the
models know of norms.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gannorm import functional as F
from gannorm.config import (
    BatchNormConfig,
    GroupNormConfig,
    InstanceNormConfig,
    LayerNormConfig,
    NoNormConfig,
    NormConfig,
)

CONDITIONAL = ("conditional_batch", "conditional_instance")


@dataclass(frozen=True)
class _Epilogue:
    """What happens behind the affine, fixed per layer."""

    activation: str | None
    negative_slope: float
    residual_after_activation: bool

    def kwargs(self, residual: Tensor | None) -> dict[str, Any]:
        return {**self.__dict__, "residual": residual}

    def __str__(self) -> str:
        slope = f"({self.negative_slope})" if self.activation == "leaky_relu" else ""
        return f", activation={self.activation}{slope}" if self.activation else ""


def _table(rows: tuple[int, ...], affine: bool) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    if not affine:
        return None, None
    return nn.Parameter(torch.empty(rows)), nn.Parameter(torch.empty(rows))


class _EpilogueMixin(nn.Module):
    epilogue: _Epilogue

    def fuse(self, activation: str, negative_slope: float) -> None:
        """Apply `activation` behind the norm from now on."""
        after = self.epilogue.residual_after_activation
        self.epilogue = _Epilogue(activation, negative_slope, after)

    def extra_repr(self) -> str:
        return super().extra_repr() + str(self.epilogue)


class InstanceNorm2d(_EpilogueMixin, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with an epilogue: same arguments, same state_dict.

    Args:
        activation: None, "relu", "leaky_relu" (slope `negative_slope`) or "silu".
        residual_after_activation: add `residual` behind the activation, not before it.

    Shapes: input and residual (N, C, H, W); output the same.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.epilogue = _Epilogue(activation, negative_slope, residual_after_activation)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        _check_channels(input, self.num_features, self)
        return F.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum or 0.0, self.eps,
            **self.epilogue.kwargs(residual),
        )  # fmt: skip


class BatchNorm2d(_EpilogueMixin, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with an epilogue: same arguments, same state_dict.

    Args:
        var_estimator: running variance "unbiased" (torch) or "biased" (TensorFlow).
        degenerate: one value per channel in training: "raise", or "beta" for exactly the bias.
        activation, negative_slope, residual_after_activation: as in `InstanceNorm2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        var_estimator: str = "unbiased",
        degenerate: str = "raise",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.epilogue = _Epilogue(activation, negative_slope, residual_after_activation)
        self.var_estimator, self.degenerate = var_estimator, degenerate

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        _check_channels(input, self.num_features, self)
        training, momentum = _begin_batch(self)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            training, momentum, self.eps, degenerate=self.degenerate,
            var_estimator=self.var_estimator, **self.epilogue.kwargs(residual),
        )  # fmt: skip


class GroupNorm(_EpilogueMixin, nn.GroupNorm):
    """`torch.nn.GroupNorm` with an epilogue: same arguments, same state_dict."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.epilogue = _Epilogue(activation, negative_slope, residual_after_activation)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        _check_channels(input, self.num_channels, self)
        return F.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            **self.epilogue.kwargs(residual),
        )  # fmt: skip


class LayerNorm2d(GroupNorm):
    """Layer norm over (C, H, W) with an affine per channel: group norm with one group.

    Keys `weight` and `bias`, each (C,).
    """

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True, **epilogue: Any):
        super().__init__(1, num_channels, eps, affine, **epilogue)


class _ConditionalNorm(_EpilogueMixin):
    """An affine table (num_classes, C) in the place of an affine."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, num_features: int, num_classes: int, eps: float, weight_init: tuple[float, float],
        epilogue: _Epilogue,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_features < 1 or num_classes < 1:
            raise ValueError(
                f"num_features and num_classes must be positive, got {num_features}, {num_classes}"
            )
        self.num_features, self.num_classes, self.eps = num_features, num_classes, eps
        self.weight_init, self.epilogue = weight_init, epilogue
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.bias = nn.Parameter(torch.empty(num_classes, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, *self.weight_init)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_classes={self.num_classes}, eps={self.eps}{self.epilogue}"


class ConditionalInstanceNorm2d(_ConditionalNorm):
    """Instance norm with the weight and bias of the sample's class (Dumoulin et al., 2017).

    Args:
        weight_init: mean and standard deviation of the weight at the start; the bias is 0.
        activation, negative_slope, residual_after_activation: as in `InstanceNorm2d`.

    Shapes: input (N, C, H, W), labels (N,) int64; weight and bias (num_classes, C).
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        epilogue = _Epilogue(activation, negative_slope, residual_after_activation)
        super().__init__(num_features, num_classes, eps, weight_init, epilogue)

    def forward(self, input: Tensor, labels: Tensor, *, residual: Tensor | None = None) -> Tensor:
        _check_channels(input, self.num_features, self)
        return F.conditional_instance_norm(
            input, labels, self.weight, self.bias, self.eps, **self.epilogue.kwargs(residual)
        )


class ConditionalBatchNorm2d(_ConditionalNorm):
    """Batch norm with the weight and bias of the sample's class (de Vries et al., 2017).

    Args:
        momentum: weight of the new batch in the running statistics; None: their plain average.
        weight_init: mean and standard deviation of the weight at the start; the bias is 0.
        The rest as in `BatchNorm2d`.

    Shapes: input (N, C, H, W), labels (N,) int64; weight and bias (num_classes, C).
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] = (1.0, 0.0),
        var_estimator: str = "unbiased",
        degenerate: str = "raise",
    ) -> None:
        epilogue = _Epilogue(activation, negative_slope, residual_after_activation)
        super().__init__(num_features, num_classes, eps, weight_init, epilogue)
        self.momentum, self.track_running_stats = momentum, track_running_stats
        self.var_estimator, self.degenerate = var_estimator, degenerate
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if tracked else None)
        self.register_buffer("running_var", torch.ones(num_features) if tracked else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracked else None)

    def forward(self, input: Tensor, labels: Tensor, *, residual: Tensor | None = None) -> Tensor:
        _check_channels(input, self.num_features, self)
        training, momentum = _begin_batch(self)
        return F.conditional_batch_norm(
            input, labels, self.running_mean, self.running_var, self.weight, self.bias,
            training, momentum, self.eps, degenerate=self.degenerate,
            var_estimator=self.var_estimator, **self.epilogue.kwargs(residual),
        )  # fmt: skip


def _begin_batch(norm: BatchNorm2d | ConditionalBatchNorm2d) -> tuple[bool, float]:
    """Whether to use the batch's statistics, and the momentum; counts the batch in training."""
    training = norm.training or norm.running_mean is None
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return training, momentum or 0.0


def _check_channels(x: Tensor, channels: int, layer: nn.Module) -> None:
    if x.dim() != 4:
        raise ValueError(f"{layer} takes (N, C, H, W), got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"{layer} takes {channels} channels, got shape {tuple(x.shape)}")


class NoNorm(nn.Module):
    """No normalization, only the epilogue: what `norm=none` puts in a norm's place."""

    def __init__(self, activation: str | None, negative_slope: float, after: bool) -> None:
        super().__init__()
        self.epilogue = _Epilogue(activation, negative_slope, after)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        after = self.epilogue.residual_after_activation
        y = input if residual is None or after else input + residual
        if self.epilogue.activation is not None:
            slope = self.epilogue.negative_slope
            y = {
                "relu": nn.functional.relu,
                "leaky_relu": lambda t: nn.functional.leaky_relu(t, slope),
                "silu": nn.functional.silu,
            }[self.epilogue.activation](y)
        return y + residual if residual is not None and after else y

    def extra_repr(self) -> str:
        return str(self.epilogue).removeprefix(", ")


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
        epilogue: dict[str, Any] = {
            "activation": activation,
            "negative_slope": negative_slope,
            "residual_after_activation": residual_after_activation,
        }
        if isinstance(cfg, NoNormConfig):
            return NoNorm(activation, negative_slope, residual_after_activation)
        assert isinstance(cfg, LayerNormConfig)  # the base of all the others
        epilogue["eps"] = cfg.eps
        if isinstance(cfg, BatchNormConfig):
            batch = {"momentum": cfg.momentum, "var_estimator": cfg.var_estimator.name, **epilogue}
            if self.conditional:
                return ConditionalBatchNorm2d(channels, self.num_classes or 0, **batch)
            return BatchNorm2d(channels, affine=cfg.affine, **batch)
        if isinstance(cfg, InstanceNormConfig):
            if self.conditional:
                return ConditionalInstanceNorm2d(channels, self.num_classes or 0, **epilogue)
            return InstanceNorm2d(channels, affine=cfg.affine, **epilogue)
        if isinstance(cfg, GroupNormConfig):
            return GroupNorm(min(cfg.num_groups, channels), channels, affine=cfg.affine, **epilogue)
        return LayerNorm2d(channels, affine=cfg.affine, **epilogue)


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
    if isinstance(norm, _ConditionalNorm):
        return norm(x, labels, residual=residual)
    return norm(x, residual=residual)
