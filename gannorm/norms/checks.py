"""What ops and layers refuse: each check names the argument, its value and the way out."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gannorm.norms.composed import has_values, is_exporting

ACTIVATIONS = (None, "relu", "leaky_relu", "silu")
DEGENERATE = ("raise", "beta")
VAR_ESTIMATORS = ("unbiased", "biased")


def quiet_tracing() -> AbstractContextManager[None]:
    """torch.jit.trace warns of every size that is looked at; ours decide nothing in the graph."""
    return _ignoring_tracer_warnings() if torch.jit.is_tracing() else nullcontext()


@contextmanager
def _ignoring_tracer_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def check_floating(t: Tensor, name: str, op: str) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        way_out = "convert it with .float()" if isinstance(t, Tensor) else "pass a torch.Tensor"
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind}; {way_out}")
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} has the layout {t.layout}; call .to_dense() on it first")


def check_input(x: Tensor, op: str, minimum_dim: int = 2) -> None:
    check_floating(x, "input", op)
    if x.dim() < minimum_dim:
        layout = "(N, C, ...)" if minimum_dim == 2 else "(N, C, L, ...)"
        wanted = f"{minimum_dim} dimensions, {layout}" if minimum_dim > 1 else "1 dimension"
        raise ValueError(f"{op}: input must have at least {wanted}, got shape {tuple(x.shape)}")


def check_layer_input(x: Any, layer: nn.Module, channels: int, layouts: Sequence[str]) -> bool:
    """Refuse what a layer with `channels` channels cannot take, in the name of the layer.

    layouts: dimensions the layer takes, such as "NCHW"; "NC.." is any number from two on.
    Returns whether `x` is a symbol of torch.fx, which has nothing to check.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        if isinstance(x, Proxy):
            return True
        check_floating(x, "input", str(layer))  # the layer's text only where it is needed
    if x.dim() == len(layouts[0]) and x.shape[1] == channels:
        return False
    sizes = [len(layout) for layout in layouts]
    open_ended = layouts[0] == "NC.."
    if x.dim() < 2 if open_ended else x.dim() not in sizes:
        named = ["(N, C, ...)" if open_ended else f"({', '.join(one)})" for one in layouts]
        raise ValueError(f"{layer} takes {' or '.join(named)}, got shape {tuple(x.shape)}")
    place = 1 if open_ended else layouts[sizes.index(x.dim())].index("C")
    if x.shape[place] != channels:
        raise ValueError(
            f"{layer} takes {channels} channels (dimension {place}), got {x.shape[place]} in an "
            f"input of shape {tuple(x.shape)}"
        )
    return False


def check_vector(t: Tensor | None, name: str, channels: int, op: str) -> None:
    if t is None:
        return
    check_floating(t, name, op)
    if tuple(t.shape) != (channels,):
        raise ValueError(
            f"{op}: {name} must have shape ({channels},), one value per channel of the input, "
            f"got {tuple(t.shape)}"
        )


def check_devices(x: Tensor, op: str, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{op}: {name} is on {t.device}, the input on {x.device}; move both to one device"
            )


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose from {tuple(known)}")


def check_groups(num_groups: Any, channels: int, op: str) -> None:
    if not isinstance(num_groups, int):
        raise TypeError(f"{op}: num_groups must be an int, got {num_groups!r}")
    if num_groups < 1 or channels % num_groups:
        fits = ", ".join(str(g) for g in range(1, channels + 1) if channels % g == 0)
        raise ValueError(
            f"{op}: num_groups={num_groups} does not divide {channels} channels; "
            f"choose one of {fits}"
        )


def check_weight_init(weight_init: tuple[float, float], affine: bool) -> None:
    if not affine:
        raise ValueError(f"weight_init={weight_init} needs a weight: affine=True")
    pair = isinstance(weight_init, Sequence) and len(weight_init) == 2
    if not pair or weight_init[1] < 0:
        raise ValueError(
            f"weight_init={weight_init} must be (mean, standard deviation), the latter not negative"
        )


def check_tables(
    weight: Tensor | None, bias: Tensor | None, labels: Tensor, x: Tensor, op: str
) -> None:
    channels = x.shape[1]
    rows = None
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        check_floating(t, name, op)
        if t.dim() != 2 or t.shape[1] != channels or rows not in (None, t.shape[0]):
            raise ValueError(
                f"{op}: {name} must have shape (num_classes, {channels}), the same for weight and "
                f"bias, got {tuple(t.shape)}"
            )
        rows = t.shape[0]
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == x.shape[:1]:
        return  # before a text is made: it would fix the batch size of what is compiled
    wanted = f"labels must be an int64 tensor of shape ({x.shape[0]},), one label per sample"
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: {wanted}, got {type(labels).__name__}; pass torch.tensor(labels)")
    got = f"got {labels.dtype} of shape {tuple(labels.shape)}"
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: {wanted}, {got}; convert them with .long()")
    raise ValueError(f"{op}: {wanted}, {got}")


def check_call(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Any,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    own: bool,
    groups: int | None,
    eps: float,
    activation: object,
    degenerate: object,
    var_estimator: object,
) -> None:
    """Everything about a norm's arguments but the values of its tensors."""
    instance = op.endswith("instance_norm")
    check_input(x, op, 3 if instance else 2)
    channels, named = x.shape[1], {"running_mean": mean, "running_var": var}
    if op.startswith("conditional"):
        check_tables(weight, bias, labels, x, op)
    else:
        named |= {"weight": weight, "bias": bias}
    for name, t in named.items():
        check_vector(t, name, channels, op)
    if residual is not None:
        check_floating(residual, "residual", op)
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: residual must have the input's shape {tuple(x.shape)}, "
                f"got {tuple(residual.shape)}"
            )
    named |= {"weight": weight, "bias": bias, "labels": labels, "residual": residual}
    check_devices(x, op, **named)
    check_choice(f"{op}: activation", activation, ACTIVATIONS)
    check_choice(f"{op}: degenerate", degenerate, DEGENERATE)
    check_choice(f"{op}: var_estimator", var_estimator, VAR_ESTIMATORS)
    if op.endswith("batch_norm") and eps <= 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}; torch's default is 1e-5")
    if op == "group_norm":
        check_groups(groups, channels, op)
    if not own:
        if mean is None or var is None:
            switch = "use_input_stats" if instance else "training"
            raise ValueError(
                f"{op}: {switch}=False needs running_mean and running_var; pass both, or "
                f"{switch}=True to use the input's own statistics"
            )
    elif instance:
        check_plane(x, op)
    elif op.endswith("batch_norm") and x.numel() // max(channels, 1) == 1 and degenerate != "beta":
        raise ValueError(
            f"{op}: one value per channel has no variance (input of shape {tuple(x.shape)}, "
            "N*H*W = 1); use a larger batch or image or a norm with statistics inside the sample"
            ', or degenerate="beta" to get exactly the bias'
        )


def check_label_values(
    labels: Tensor | None, weight: Tensor | None, bias: Tensor | None, op: str
) -> None:
    """Refuse labels that are no row of the tables (num_classes, C)."""
    if is_exporting() or torch.jit.is_tracing():
        return  # what runs the graph looks rows up by its own rules
    rows = next((len(t) for t in (weight, bias) if t is not None), None)
    if rows is None or labels is None or not labels.numel():
        return
    if torch.compiler.is_compiling():
        fits = ((labels >= 0) & (labels < rows)).all()
        torch._assert_async(fits, f"{op}: labels must lie in 0..{rows - 1}")
    elif labels.device.type == "cpu" and has_values(labels):  # a GPU would have to be waited for
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= rows:
            raise ValueError(
                f"{op}: labels must lie in 0..{rows - 1} (num_classes={rows}), got {low}..{high}; "
                "number the classes from 0, or give the table a row for each"
            )


def check_plane(x: Tensor, op: str) -> None:
    if x.dim() > 2 and math.prod(x.shape[2:]) == 1 and x.numel():
        raise ValueError(
            f"{op}: one value per plane has no variance (input of shape {tuple(x.shape)}, "
            "H*W = 1); use a larger image, fewer downsamplings, or another norm"
        )


def check_broadcast(x: Tensor, op: str, **others: Tensor) -> None:
    """Refuse what is no floating-point tensor or does not broadcast against `x`."""
    for name, t in others.items():
        check_floating(t, name, op)
        pairs = zip(reversed(x.shape), reversed(t.shape), strict=False)
        if any(a != b and a != 1 and b != 1 for a, b in pairs):
            raise ValueError(
                f"{op}: {name} of shape {tuple(t.shape)} does not broadcast against the input of "
                f"shape {tuple(x.shape)}; one value per channel of (N, C, H, W) is (1, C, 1, 1)"
            )


def check_dims(dim: int | Sequence[int], x: Tensor, op: str) -> tuple[int, ...]:
    """`dim` as a tuple of different dimensions of `x`, counted from 0."""
    dims = (dim,) if isinstance(dim, int) else dim
    if not isinstance(dims, Sequence) or not all(isinstance(d, int) for d in dims):
        raise TypeError(f"{op}: dim must be an int or a sequence of them, got dim={dim!r}")
    every = x.dim()
    if not dims:  # all dimensions for torch, none for TensorFlow
        raise ValueError(
            f"{op}: dim={dim} names no dimension; for all of them pass {tuple(range(every))}"
        )
    if any(not -every <= d < every for d in dims):
        raise ValueError(
            f"{op}: dim={dim} is out of range for an input of shape {tuple(x.shape)}; "
            f"its dimensions are {-every}..{every - 1}"
        )
    counted = tuple(d % every for d in dims)
    if len(set(counted)) < len(counted):
        raise ValueError(
            f"{op}: dim={dim} names a dimension twice in an input of shape {tuple(x.shape)}; "
            "name each once"
        )
    return counted
