"""The norm layers: torch's constructors and state_dict keys, plus a fused epilogue.

norm = InstanceNorm2d(64, activation="relu")            # norm and ReLU in one kernel
norm = ConditionalBatchNorm2d(64, num_classes=10)
y = norm(x);  y = norm(x, labels);  y = norm(x, residual=skip)
"""

import torch
from torch import Tensor, nn

from gannorm.norms import functional as F
from gannorm.norms.base import BatchLayer, Epilogue, NormLayer
from gannorm.norms.checks import check_groups, check_layer_input

Device = torch.device | str | int | None


class InstanceNorm2d(NormLayer, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with an epilogue: same arguments, same state_dict.

    Args:
        activation: None, "relu", "leaky_relu" (slope `negative_slope`) or "silu".
        residual_after_activation: add `residual` behind the activation, not before it.
        weight_init: mean and standard deviation of the weight at the start; None: all 1.

    Shapes: input and residual (N, C, H, W) or (C, H, W); output the same.
    """

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

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        check_layer_input(input, self, self.num_features, ("NCHW", "CHW"))
        unbatched = input.dim() == 3
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        y = F.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum or 0.0, self.eps,
            **self.epilogue.kwargs(residual),
        )  # fmt: skip
        return y.squeeze(0) if unbatched else y


class BatchNorm2d(BatchLayer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with an epilogue: same arguments, same state_dict.

    Args:
        var_estimator: running variance "unbiased" (torch) or "biased" (TensorFlow).
        degenerate: one value per channel in training: "raise", or "beta" for exactly the bias.
        activation, negative_slope, residual_after_activation, weight_init: as in `InstanceNorm2d`.

    Shapes: input and residual (N, C, H, W); output the same.
    """

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

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        check_layer_input(input, self, self.num_features, ("NCHW",))

        def run(mean: Tensor | None, var: Tensor | None, training: bool, momentum: float) -> Tensor:
            return F.batch_norm(
                input, mean, var, self.weight, self.bias, training, momentum, self.eps,
                degenerate=self.degenerate, var_estimator=self.var_estimator,
                **self.epilogue.kwargs(residual),
            )  # fmt: skip

        return self._on_running_stats(input, run)


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

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        check_layer_input(input, self, self.num_channels, ("NC...",))
        return F.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            **self.epilogue.kwargs(residual),
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

    def __init__(
        self, num_features: int, num_classes: int, eps: float, device: Device,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_features < 1 or num_classes < 1:
            raise ValueError(
                f"num_features and num_classes must be positive, got {num_features}, {num_classes}"
            )
        self.num_features, self.num_classes, self.eps = num_features, num_classes, eps
        rows = (num_classes, num_features)
        self.weight = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        shown = f"{self.num_features}, num_classes={self.num_classes}, eps={self.eps}"
        return shown + self._settings()


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
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.2,
        residual_after_activation: bool = False,
        weight_init: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        super().__init__(num_features, num_classes, eps, device, dtype)
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._extend(epilogue, weight_init)

    def forward(self, input: Tensor, labels: Tensor, *, residual: Tensor | None = None) -> Tensor:
        check_layer_input(input, self, self.num_features, ("NCHW",))
        return F.conditional_instance_norm(
            input, labels, self.weight, self.bias, self.eps, **self.epilogue.kwargs(residual)
        )


class ConditionalBatchNorm2d(_ConditionalNorm, BatchLayer):
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
        super().__init__(num_features, num_classes, eps, device, dtype)
        self.momentum, self.track_running_stats = momentum, track_running_stats
        for name in ("running_mean", "running_var"):
            buffer = torch.empty(num_features, device=device, dtype=dtype)
            self.register_buffer(name, buffer if track_running_stats else None)
        count = torch.empty((), dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", count if track_running_stats else None)
        epilogue = Epilogue(activation, negative_slope, residual_after_activation)
        self._extend(epilogue, weight_init)
        self._extend_batch(var_estimator, degenerate)

    def forward(self, input: Tensor, labels: Tensor, *, residual: Tensor | None = None) -> Tensor:
        check_layer_input(input, self, self.num_features, ("NCHW",))

        def run(mean: Tensor | None, var: Tensor | None, training: bool, momentum: float) -> Tensor:
            return F.conditional_batch_norm(
                input, labels, mean, var, self.weight, self.bias, training, momentum, self.eps,
                degenerate=self.degenerate, var_estimator=self.var_estimator,
                **self.epilogue.kwargs(residual),
            )  # fmt: skip

        return self._on_running_stats(input, run)

    def extra_repr(self) -> str:
        shown = f", momentum={self.momentum}, track_running_stats={self.track_running_stats}"
        return super().extra_repr().replace(f"eps={self.eps}", f"eps={self.eps}{shown}", 1)
