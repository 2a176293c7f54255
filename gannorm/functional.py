"""Public ops: torch's signatures first, our epilogue after the star, the backend picked here.

    y = act((x - mean) * rstd * weight[label] + bias[label] (+ residual)) (+ residual)

Statistics over one plane (instance), a group of planes (group, layer) or one channel of the
batch (batch); the affine is a table of rows picked by label. See `docs/design.md`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gannorm import native, ops, reference
from gannorm.autograd import NormFunction, planes, run_forward, table
from gannorm.backend import module_for, use_backend
from gannorm.checks import (
    ACTIVATIONS,
    DEGENERATE,
    VAR_ESTIMATORS,
    check_broadcast,
    check_choice,
    check_devices,
    check_dims,
    check_floating,
    check_groups,
    check_input,
    check_label_values,
    check_plane,
    check_tables,
    check_vector,
)
from gannorm.reference import NormSpec, Running, transformed

__all__ = [
    "batch_norm",
    "batch_normalization",
    "conditional_batch_norm",
    "conditional_instance_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "moments",
    "use_backend",
]


def _normalize(
    x: Tensor,
    weight: Tensor | None,  # (C,), or (K, C) with labels
    bias: Tensor | None,
    labels: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
    groups: int,
    eps: float,
    op: str,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
    residual_after_activation: bool,
    running: Running | None = None,
) -> Tensor:
    """Check the epilogue, flatten to (N, C, S), run the Function, restore shape and layout."""
    if activation not in ACTIVATIONS:
        check_choice(f"{op}: activation", activation, ACTIVATIONS)
    if residual is not None:
        check_floating(residual, "residual", op)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the input's shape {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    check_devices(x, op, weight=weight, bias=bias, labels=labels, residual=residual)
    spec = NormSpec(groups, eps, activation, negative_slope, residual_after_activation)
    if residual is not None:
        residual = residual.to(x.dtype)
    by_torch = transformed()
    backend = reference if by_torch else module_for(x)
    compiling = torch.compiler.is_compiling()
    on_kernels = backend is not native and backend is not reference
    if weight is None and bias is None:
        labels = None
    if labels is not None and backend is not native:  # which looks itself
        check_label_values(labels, weight, bias, op)
    rows, in_place = x, False
    if by_torch or compiling or not (native.takes(x) if backend is native else x.is_contiguous()):
        rows = planes(x)
        in_place = (on_kernels or backend is native) and native.is_last(rows)
        if rows.stride(2) != 1 and not in_place:
            rows = rows.contiguous()
        residual = None if residual is None else planes(residual)
        weight, bias = table(weight), table(bias)
    if on_kernels:
        weight, bias, labels = (
            None if t is None else t.contiguous() for t in (weight, bias, labels)
        )
        given = given and (given[0].contiguous(), given[1].contiguous())
    stats = None  # of which the running statistics are still to be moved
    if by_torch:
        y, stats = reference.forward(rows, weight, bias, labels, residual, given, spec)
    elif on_kernels and compiling:
        mean, var = given or (None, None)
        y, stats = ops.norm(rows, weight, bias, labels, residual, mean, var, *spec)
    elif compiling:
        y, stats = NormFunction.apply(
            rows, weight, bias, residual, labels, given, None, spec, backend, True
        )
    else:
        try:
            if torch.is_grad_enabled():
                y = NormFunction.apply(
                    rows, weight, bias, residual, labels, given, running, spec, backend, False
                )
            else:
                y, _ = run_forward(
                    backend, rows, weight, bias, labels, residual, given, spec, running
                )
        except native.NoSuchRow:
            assert labels is not None
            check_label_values(labels, weight, bias, op)  # raises, in the user's words
            raise
    if running is not None and stats is not None:
        reference.update_running(running, stats)
    if rows is x:
        return y
    y = y.reshape(x.shape)
    if x.dim() == 4 and not (in_place or by_torch):
        y = y.contiguous(memory_format=_memory_format(x))
    return y


def _memory_format(x: Tensor) -> torch.memory_format:
    """Of the output for `x`: channels_last where it is that and not contiguous as well."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    op: str,
    degenerate: str,
    var_estimator: str,
    **epilogue: Any,
) -> Tensor:
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        check_vector(t, name, x.shape[1], op)
        check_devices(x, op, **{name: t})
    check_choice(f"{op}: degenerate", degenerate, DEGENERATE)
    check_choice(f"{op}: var_estimator", var_estimator, VAR_ESTIMATORS)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                f"{op}: training=False needs running_mean and running_var; pass both, or "
                "training=True to use the batch's own statistics"
            )
        stats = (running_mean, running_var)
        return _normalize(x, weight, bias, labels, stats, 0, eps, op, **epilogue)
    count = x.numel() // max(x.shape[1], 1)
    if count == 1 and degenerate != "beta":
        raise ValueError(
            f"{op}: one value per channel has no variance (input of shape {tuple(x.shape)}, "
            "N*H*W = 1); use a larger batch or image or a norm with statistics inside the sample"
            ', or degenerate="beta" to get exactly the bias'
        )
    running = None
    if count and (running_mean is not None or running_var is not None):
        bessel = count / max(count - 1, 1) if var_estimator == "unbiased" else 1.0
        running = (running_mean, running_var, momentum, bessel)
    return _normalize(x, weight, bias, labels, None, 0, eps, op, **epilogue, running=running)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    degenerate: str = "raise",
    var_estimator: str = "unbiased",
) -> Tensor:
    """Batch norm (Ioffe and Szegedy, 2015) of `input` (N, C, ...), with the fused epilogue.

    Args:
        running_mean, running_var: (C,), updated in place when `training`, used when not.
        weight, bias: (C,) or None.
        degenerate: what N*H*W = 1 in training does: "raise", or "beta": exactly the bias.
        var_estimator: "unbiased" (torch) or "biased" (TensorFlow) running variance.
    """
    check_input(input, "batch_norm")
    for name, t in (("weight", weight), ("bias", bias)):
        check_vector(t, name, input.shape[1], "batch_norm")
    return _batch_norm(
        input, weight, bias, None, running_mean, running_var, training, momentum, eps,
        "batch_norm", degenerate, var_estimator, activation=activation,
        negative_slope=negative_slope, residual=residual,
        residual_after_activation=residual_after_activation,
    )  # fmt: skip


def conditional_batch_norm(
    input: Tensor,
    labels: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    degenerate: str = "raise",
    var_estimator: str = "unbiased",
) -> Tensor:
    """Batch norm whose affine row is the sample's label's (de Vries et al., 2017).

    Args:
        input: (N, C, ...). labels: (N,) int64. weight, bias: (num_classes, C).
        The rest as in `batch_norm`.
    """
    op = "conditional_batch_norm"
    check_input(input, op)
    check_tables(weight, bias, labels, input, op)
    return _batch_norm(
        input, weight, bias, labels, running_mean, running_var, training, momentum, eps, op,
        degenerate, var_estimator, activation=activation, negative_slope=negative_slope,
        residual=residual, residual_after_activation=residual_after_activation,
    )  # fmt: skip


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
) -> Tensor:
    """Instance norm (Ulyanov et al., 2016) of `input` (N, C, ...), with the fused epilogue.

    Args:
        running_mean, running_var: (C,), averaged over the samples' statistics when
            `use_input_stats`, used in their place when not.
        weight, bias: (C,) or None.
    """
    op = "instance_norm"
    check_input(input, op, 3)
    channels = input.shape[1]
    named = {"weight": weight, "bias": bias, "running_mean": running_mean,
             "running_var": running_var}  # fmt: skip
    for name, t in named.items():
        check_vector(t, name, channels, op)
    check_devices(input, op, **named)
    epilogue = (activation, negative_slope, residual, residual_after_activation)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError(f"{op}: use_input_stats=False needs running_mean and running_var")
        stats = (running_mean, running_var)
        return _normalize(input, weight, bias, None, stats, 0, eps, op, *epilogue)
    check_plane(input, op)
    running = None
    if input.numel() and (running_mean is not None or running_var is not None):
        count = math.prod(input.shape[2:])
        running = (running_mean, running_var, momentum, count / (count - 1))
    return _normalize(input, weight, bias, None, None, channels, eps, op, *epilogue, running)


def conditional_instance_norm(
    input: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
) -> Tensor:
    """Instance norm whose affine row is the sample's label's (Dumoulin et al., 2017).

    With labels 0..N-1 and N rows it is an affine per sample (AdaIN).

    Args:
        input: (N, C, ...). labels: (N,) int64. weight, bias: (num_classes, C).
    """
    op = "conditional_instance_norm"
    check_input(input, op, 3)
    check_tables(weight, bias, labels, input, op)
    check_plane(input, op)
    return _normalize(
        input, weight, bias, labels, None, input.shape[1], eps, op, activation, negative_slope,
        residual, residual_after_activation,
    )  # fmt: skip


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
) -> Tensor:
    """Group norm (Wu and He, 2018) of `input` (N, C, ...), with the fused epilogue.

    Args:
        num_groups: must divide C. weight, bias: (C,) or None.
    """
    op = "group_norm"
    check_input(input, op)
    channels = input.shape[1]
    check_groups(num_groups, channels, op)
    for name, t in (("weight", weight), ("bias", bias)):
        check_vector(t, name, channels, op)
    return _normalize(
        input, weight, bias, None, None, num_groups, eps, op, activation,
        negative_slope, residual, residual_after_activation,
    )  # fmt: skip


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm (Ba et al., 2016) over the last dimensions, those of `normalized_shape`.

    Args:
        weight, bias: of shape `normalized_shape`, one value per element, or None.
    """
    op = "layer_norm"
    check_input(input, op, 1)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape={shape} must equal the last dimensions of the input, "
            f"whose shape is {tuple(input.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        check_floating(t, name, op)
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(t.shape)}")
    # One group of `width` channels with one element each: the affine is then per element.
    width = math.prod(shape)
    rows = input.reshape(math.prod(input.shape[: -len(shape)]), width)
    weight, bias = (None if t is None else t.reshape(width) for t in (weight, bias))
    y = _normalize(rows, weight, bias, None, None, 1, eps, op, None, 0.0, None, False)
    return y.view(input.shape)


def moments(
    input: Tensor, dim: int | Sequence[int], keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the dimensions `dim`, as TensorFlow's `tf.nn.moments`.

    `dim` counts as torch's: for a 4-D input (2, 3) is per plane, (0, 2, 3) per channel, 0 per
    position. Computed in float32 (float64 for float64), returned in the input's dtype. Over no
    values both are NaN, as torch's.
    """
    check_input(input, "moments", 1)
    dims = check_dims(dim, input, "moments")
    x = input.to(reference.stat_dtype(input.dtype))
    first = x.detach() if x.numel() else x.new_zeros(())
    for d in dims if x.numel() else ():
        first = first.narrow(d, 0, 1)
    shifted = x - first  # a constant then has exactly itself as mean, and variance 0
    mean = shifted.mean(dims, keepdim=True)
    var = (shifted - mean).square().mean(dims, keepdim=True)
    mean = mean + first
    if not keepdim:
        mean, var = mean.squeeze(dims), var.squeeze(dims)
    return mean.to(input.dtype), var.to(input.dtype)


def batch_normalization(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    offset: Tensor | None,
    scale: Tensor | None,
    variance_epsilon: float,
) -> Tensor:
    """scale * (x - mean) / sqrt(variance + variance_epsilon) + offset, all broadcast.

    TensorFlow's `tf.nn.batch_normalization`: statistics in, normalized values out.
    """
    op = "batch_normalization"
    check_input(x, op, 0)
    affine = {name: t for name, t in (("offset", offset), ("scale", scale)) if t is not None}
    check_broadcast(x, op, mean=mean, variance=variance, **affine)
    check_devices(x, op, mean=mean, variance=variance, **affine)
    dtype = reference.stat_dtype(x.dtype)
    factor = (variance.to(dtype) + variance_epsilon).rsqrt()
    if scale is not None:
        factor = factor * scale
    y = (x.to(dtype) - mean) * factor
    if offset is not None:
        y = y + offset
    return y.to(x.dtype)
