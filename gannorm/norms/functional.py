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
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gannorm.norms import composed, cpu, ops, portable, sync
from gannorm.norms.autograd import Call, Moments, NormFunction
from gannorm.norms.backend import module_for, selected, use_backend
from gannorm.norms.checks import (
    check_broadcast,
    check_call,
    check_devices,
    check_dims,
    check_floating,
    check_input,
    check_label_values,
    quiet_tracing,
)
from gannorm.norms.composed import NormSpec, is_plain, transformed

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


KEPT = 4096  # kinds of calls that are remembered
_calls: dict[Any, Call] = {}


def _normalize(
    op: str,
    x: Tensor,
    weight: Tensor | None,  # (C,), or (K, C) with labels
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,  # (C,), like var: given, or the running one
    var: Tensor | None,
    own: bool,  # the input's own statistics
    momentum: float,
    *settings: Any,  # the last parameters of `_decide`
) -> Tensor:
    """The one way through a call: look up what is known of its kind, or check and decide; run."""
    if own and (mean is not None or var is not None) and composed.is_recomputed():
        mean = var = None
    tensors = x, weight, bias, labels, residual, mean, var
    if has_torch_function_variadic(*tensors):  # symbols of torch.fx, subclasses, modes
        return handle_torch_function(_normalize, tensors, op, *tensors, own, momentum, *settings)
    seen = torch.compiler.is_compiling() or transformed() or composed.recorded()
    call = key = None
    if not seen:
        try:
            key = (op, own, settings, selected(), *map(_facts, tensors))
            call = _calls.get(key)
        except (AttributeError, TypeError, RuntimeError):  # the checks will say what is no tensor,
            key = None  # has no strides, or is no setting
    if call is None:
        with quiet_tracing():
            call = _decide(op, tensors, own, *settings)
        _remember(key, tensors, call)
    if weight is None and bias is None:
        labels = None
    if call.check_labels:
        check_label_values(labels, weight, bias, op)
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    moments = mean, var, momentum
    if seen or call.portable:
        return _seen(op, call, x, weight, bias, labels, residual, moments)
    try:
        if torch.is_grad_enabled():
            return NormFunction.apply(x, weight, bias, residual, labels, moments, call)
        return call.forward(x, weight, bias, labels, residual, moments)[0]
    except cpu.NoSuchRow:
        check_label_values(labels, weight, bias, op)  # raises, in the user's words
        raise


def _remember(key: Any, tensors: Any, call: Call) -> None:
    if key is None or not all(map(is_plain, tensors)):
        return
    if len(_calls) >= KEPT:
        _calls.clear()
    _calls[key] = call


def _facts(t: Tensor | None) -> Any:
    """What is decided about a tensor depends on this alone."""
    if t is None:
        return None
    return type(t), t.shape, t.stride(), t.dtype, t.device, t.is_neg()


def _decide(
    op: str,
    tensors: Any,  # x, weight, bias, labels, residual, mean, var
    own: bool,
    groups: int | None,  # sets of channels with statistics of their own; 0: across the batch;
    eps: float,  # None: one channel of a sample
    activation: str | None,
    negative_slope: float,
    residual_after_activation: bool,
    degenerate: str = "raise",
    var_estimator: str = "unbiased",
    group: str | None = None,  # of several processes, `sync.resolved`
) -> Call:
    """Check the arguments; choose who runs the call."""
    x, weight, bias, labels, residual, mean, var = tensors
    later = group is not None and degenerate == "raise"  # when all values of a channel are known
    check_call(
        op, x, weight, bias, labels, residual, mean, var, own, groups, eps, activation,
        "beta" if later else degenerate, var_estimator,
    )  # fmt: skip
    channels = x.shape[1]
    if groups is None:
        groups = channels if own else 0  # given statistics are a channel's of the batch
    spec = NormSpec(groups, eps, activation, negative_slope, residual_after_activation)
    folded = residual is not None and activation is not None and not residual_after_activation
    if group is not None:
        if transformed() or portable.is_asked(*tensors):
            raise RuntimeError(f"{op}: {sync.ALONE}")
        return ops.together(tensors, spec, group, degenerate, var_estimator, folded)
    count = math.prod(x.shape[2:]) if groups else x.numel() // max(channels, 1)
    running = bool(own and x.numel() and (mean is not None or var is not None))
    unbiased = running and var_estimator == "unbiased"
    to_torch = (
        portable.is_asked(*tensors)
        and portable.supports(x, weight, bias, mean, var)
        and (not own or groups > 0 or count > 1)  # one value has no unbiased variance
        and not transformed()
    )
    backend = composed if transformed() or composed.recorded() or to_torch else module_for(x)
    launches = None
    kernels = backend is not cpu and backend is not composed
    if kernels and not torch.compiler.is_compiling():
        launches = backend.launches(tensors, spec, not own)
    return Call(
        spec, backend, launches, not own, running,
        count / max(count - 1, 1) if unbiased else 1.0,
        folded=folded,
        check_labels=labels is not None and backend is not cpu,  # which looks itself
        portable=to_torch, biased=running and not unbiased,
    )  # fmt: skip


def _seen(
    op: str, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    labels: Tensor | None, residual: Tensor | None, moments: Moments,
) -> Tensor:  # fmt: skip
    """A call whose operators somebody sees: a compiler, a graph, a transform.

    But for torch's own batch norms the running statistics move outside of it.
    """
    mean, var, momentum = moments
    if call.portable:
        instance = op.endswith("instance_norm")
        return portable.forward(
            x, weight, bias, labels, residual, *moments, call.given, instance,
            call.biased, call.spec,
        )  # fmt: skip
    given: Any = (mean, var) if call.given else None
    if call.sync is not None:
        group, _, _, degenerate, var_estimator = call.sync
        y, stats = ops.sync_norm(
            x, weight, bias, labels, residual, *call.spec[1:], group, degenerate
        )
        sync.update_running(moments, stats, var_estimator)
        return y
    if transformed() or composed.recorded():
        y, stats = composed.forward(x, weight, bias, labels, residual, given, call.spec)
    elif call.backend is composed:
        y, stats = NormFunction.apply(
            x, weight, bias, residual, labels, moments, call._replace(return_stats=True)
        )
    else:
        weight, bias, labels = (
            None if t is None else t.contiguous() for t in (weight, bias, labels)
        )
        mean, var = (t.contiguous() for t in given) if given else (None, None)
        y, stats = ops.norm(x, weight, bias, labels, residual, mean, var, *call.spec)
    if call.running:
        composed.update_running((*moments, call.bessel), stats)
    return y


def _shared_with(process_group: Any, training: bool) -> str | None:
    return None if process_group is None or not training else sync.resolved(process_group)


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
    process_group: Any = None,
) -> Tensor:
    """Batch norm (Ioffe and Szegedy, 2015) of `input` (N, C, ...), with the fused epilogue.

    Args:
        running_mean, running_var: (C,), updated in place when `training`, used when not.
        weight, bias: (C,) or None.
        degenerate: what N*H*W = 1 in training does: "raise", or "beta": exactly the bias.
        var_estimator: "unbiased" (torch) or "biased" (TensorFlow) running variance.
        process_group: the processes whose batches are one in training: "world", a group of
            torch.distributed's or its name; None: this one (see `gannorm.norms.sync`).
    """
    return _normalize(
        "batch_norm", input, weight, bias, None, residual, running_mean, running_var, training,
        momentum, 0, eps, activation, negative_slope, residual_after_activation, degenerate,
        var_estimator, _shared_with(process_group, training),
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
    process_group: Any = None,
) -> Tensor:
    """Batch norm whose affine row is the sample's label's (de Vries et al., 2017).

    Args:
        input: (N, C, ...). labels: (N,) int64. weight, bias: (num_classes, C).
        The rest as in `batch_norm`.
    """
    return _normalize(
        "conditional_batch_norm", input, weight, bias, labels, residual, running_mean,
        running_var, training, momentum, 0, eps, activation, negative_slope,
        residual_after_activation, degenerate, var_estimator,
        _shared_with(process_group, training),
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
    return _normalize(
        "instance_norm", input, weight, bias, None, residual, running_mean, running_var,
        use_input_stats, momentum, None, eps, activation, negative_slope,
        residual_after_activation,
    )  # fmt: skip


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
    return _normalize(
        "conditional_instance_norm", input, weight, bias, labels, residual, None, None, True, 0.0,
        None, eps, activation, negative_slope, residual_after_activation,
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
    return _normalize(
        "group_norm", input, weight, bias, None, residual, None, None, True, 0.0, num_groups, eps,
        activation, negative_slope, residual_after_activation,
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
    op, tensors = "layer_norm", (input, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            layer_norm, tensors, input, normalized_shape, weight, bias, eps
        )
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
    if portable.is_asked(*tensors) and portable.supports(*tensors) and not transformed():
        y = torch.layer_norm(input, shape, weight, bias, eps)
        return y if y.dtype == input.dtype else y.to(input.dtype)  # autocast makes it float32
    # One group of `width` channels with one element each: the affine is then per element.
    width = math.prod(shape)
    rows = input.reshape(math.prod(input.shape[: -len(shape)]), width)
    weight, bias = (None if t is None else t.reshape(width) for t in (weight, bias))
    none = None, None, None, None
    y = _normalize(op, rows, weight, bias, *none, True, 0.0, 1, eps, None, 0.0, False)
    return y.view(input.shape)


def moments(
    input: Tensor, dim: int | Sequence[int], keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the dimensions `dim`, as TensorFlow's `tf.nn.moments`.

    `dim` counts as torch's: for a 4-D input (2, 3) is per plane, (0, 2, 3) per channel, 0 per
    position. Computed in float32 (float64 for float64), returned in the input's dtype. Over no
    values both are NaN, as torch's.
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(moments, (input,), input, dim, keepdim)
    check_input(input, "moments", 1)
    dims = check_dims(dim, input, "moments")
    x = input.to(composed.stat_dtype(input.dtype))
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
    op, tensors = "batch_normalization", (x, mean, variance, offset, scale)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(batch_normalization, tensors, *tensors, variance_epsilon)
    check_input(x, op, 0)
    affine = {name: t for name, t in (("offset", offset), ("scale", scale)) if t is not None}
    check_broadcast(x, op, mean=mean, variance=variance, **affine)
    check_devices(x, op, mean=mean, variance=variance, **affine)
    dtype = composed.stat_dtype(x.dtype)
    factor = (variance.to(dtype) + variance_epsilon).rsqrt()
    if scale is not None:
        factor = factor * scale
    y = (x.to(dtype) - mean) * factor
    if offset is not None:
        y = y + offset
    return y.to(x.dtype)
