"""The norm layers: torch's constructors and state_dict keys, plus a fused epilogue.

norm = InstanceNorm2d(64, activation="relu")            # norm and ReLU in one kernel
norm = ConditionalBatchNorm2d(64, num_classes=10)
y = norm(x);  y = norm(x, labels);  y = norm(x, residual=skip)
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm

from gannorm.norms import functional as F
from gannorm.norms.base import BatchLayer, Epilogue, NormLayer, UntrackedLayer, symbol
from gannorm.norms.checks import check_groups, check_layer_input

Device = torch.device | str | int | None


class _InstanceNorm(UntrackedLayer, instancenorm._InstanceNorm):
    layouts: tuple[str, ...]  # (N, C, ...) and without N

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._extend(epilogue, weight_init, bias)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, epilogue: Epilogue | None = None
    ) -> Tensor:
        if check_layer_input(input, self, self.num_features, self.layouts):
            return symbol(self, input, residual)
        unbatched = input.dim() < len(self.layouts[0])
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        y = F.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum or 0.0, self.eps,
            **(epilogue or self.epilogue).kwargs(residual),
        )  # fmt: skip
        return y.squeeze(0) if unbatched else y


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with an epilogue: same arguments, same state_dict.

    Args:
        activation: None, "relu", "leaky_relu" (slope `negative_slope`) or "silu".
        residual_after_activation: add `residual` behind the activation, not before it.
        weight_init: mean and standard deviation of the weight at the start; None: all 1.

    Shapes: input and residual (N, C, H, W) or (C, H, W); output the same.
    """

    layouts = "NCHW", "CHW"


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`InstanceNorm2d` of (N, C, L) or (C, L)."""

    layouts = "NCL", "CL"


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`InstanceNorm2d` of (N, C, D, H, W) or (C, D, H, W)."""

    layouts = "NCDHW", "CDHW"


class _BatchNorm(BatchLayer, batchnorm._BatchNorm):
    layouts: tuple[str, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] | None = None,
        var_estimator: str = "unbiased",
        degenerate: str = "raise",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._extend(epilogue, weight_init, bias)
        self._extend_batch(var_estimator, degenerate)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, epilogue: Epilogue | None = None
    ) -> Tensor:
        if check_layer_input(input, self, self.num_features, self.layouts):
            return symbol(self, input, residual)

        def run(mean: Tensor | None, var: Tensor | None, training: bool, momentum: float) -> Tensor:
            return F.batch_norm(
                input, mean, var, self.weight, self.bias, training, momentum, self._eps,
                degenerate=self.degenerate, var_estimator=self.var_estimator,
                process_group=self._with(), **(epilogue or self.epilogue).kwargs(residual),
            )  # fmt: skip

        return self._on_running_stats(input, run)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with an epilogue: same arguments, same state_dict.

    Args:
        var_estimator: running variance "unbiased" (torch) or "biased" (TensorFlow).
        degenerate: one value per channel in training: "raise", or "beta" for exactly the bias.
        activation, negative_slope, residual_after_activation, weight_init: as in `InstanceNorm2d`.

    Shapes: input and residual (N, C, H, W); output the same.
    """

    layouts = ("NCHW",)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`BatchNorm2d` of (N, C, L) or (N, C)."""

    layouts = "NCL", "NC"


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`BatchNorm2d` of (N, C, D, H, W)."""

    layouts = ("NCDHW",)


class GroupNorm(NormLayer, nn.GroupNorm):
    """`torch.nn.GroupNorm` with an epilogue: same arguments, same state_dict.

    Args:
        num_groups: must divide `num_channels`.
        activation, negative_slope, residual_after_activation, weight_init: as in `InstanceNorm2d`.

    Shapes: input and residual (N, C, ...); output the same.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] | None = None,
    ) -> None:
        check_groups(num_groups, num_channels, type(self).__name__)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._extend(epilogue, weight_init, bias)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, epilogue: Epilogue | None = None
    ) -> Tensor:
        if check_layer_input(input, self, self.num_channels, ("NC..",)):
            return symbol(self, input, residual)
        return F.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            **(epilogue or self.epilogue).kwargs(residual),
        )  # fmt: skip


class LayerNorm2d(GroupNorm):
    """Layer norm over (C, H, W) with an affine per channel: group norm with one group.

    Arguments and shapes as in `GroupNorm`; keys `weight` and `bias`, each (C,).
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(
            1, num_channels, eps, affine, device, dtype, bias=bias, activation=activation,
            negative_slope=negative_slope, residual_after_activation=residual_after_activation,
            weight_init=weight_init,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr().removeprefix("1, ")


class _ConditionalNorm(NormLayer):
    """An affine table (num_classes, C) in the place of an affine."""

    weight_init = (1.0, 0.0)
    num_features: int

    def _make_tables(
        self, num_classes: int, device: Device, dtype: torch.dtype | None, epilogue: Epilogue,
        weight_init: tuple[float, float],
    ) -> None:  # fmt: skip
        channels = self.num_features
        if channels < 1 or num_classes < 1:
            raise ValueError(
                f"num_features and num_classes must be positive, got {channels}, {num_classes}"
            )
        self.num_classes = num_classes
        rows = (num_classes, channels)
        self.weight = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self._extend(epilogue, weight_init)

    def extra_repr(self) -> str:
        shown = f"{self.num_features}, num_classes={self.num_classes}, eps={self.eps}"
        return shown + self._settings()


class ConditionalInstanceNorm2d(_ConditionalNorm, UntrackedLayer):
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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._make_tables(num_classes, device, dtype, epilogue, weight_init)

    def forward(self, input: Tensor, labels: Tensor, residual: Tensor | None = None) -> Tensor:
        if check_layer_input(input, self, self.num_features, ("NCHW",)):
            return symbol(self, input, labels, residual)
        return F.conditional_instance_norm(
            input, labels, self.weight, self.bias, self.eps, **self.epilogue.kwargs(residual)
        )


class ConditionalBatchNorm2d(_ConditionalNorm, BatchLayer, batchnorm._BatchNorm):
    """Batch norm with the weight and bias of the sample's class (de Vries et al., 2017).

    Args:
        momentum: weight of the new batch in the running statistics; None: their plain average.
        weight_init: mean and standard deviation of the weight at the start; the bias is 0.
        The rest as in `BatchNorm2d`.

    Shapes: input (N, C, H, W), labels (N,) int64; weight and bias (num_classes, C).
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] = (1.0, 0.0),
        var_estimator: str = "unbiased",
        degenerate: str = "raise",
    ) -> None:
        super().__init__(num_features, eps, momentum, False, track_running_stats, device, dtype)
        self.affine = True
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._make_tables(num_classes, device, dtype, epilogue, weight_init)
        self._extend_batch(var_estimator, degenerate)

    def forward(  # type: ignore[override]  # which has no labels
        self, input: Tensor, labels: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        if check_layer_input(input, self, self.num_features, ("NCHW",)):
            return symbol(self, input, labels, residual)

        def run(mean: Tensor | None, var: Tensor | None, training: bool, momentum: float) -> Tensor:
            return F.conditional_batch_norm(
                input, labels, mean, var, self.weight, self.bias, training, momentum,
                self._eps, degenerate=self.degenerate, var_estimator=self.var_estimator,
                process_group=self._with(), **self.epilogue.kwargs(residual),
            )  # fmt: skip

        return self._on_running_stats(input, run)

    def extra_repr(self) -> str:
        shown = f", momentum={self.momentum}, track_running_stats={self.track_running_stats}"
        return super().extra_repr().replace(f"eps={self.eps}", f"eps={self.eps}{shown}", 1)
