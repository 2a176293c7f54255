"""The state of every norm layer of a network: what it averages over, its weights, what is wrong."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gannorm.norms.base import BatchLayer, NormLayer
from gannorm.norms.layers import GroupNorm

DEAD, EXPLODING = 1e-3, 1e3  # of weights
FAR = 3.0  # a channel's mean off by that many standard deviations, or its variance by e**that
AVERAGED = "averaged."  # before the name of a generator's EMA
Gaps = dict[str, float]


def norm_layers(net: nn.Module) -> dict[str, nn.Module]:
    """A network's norm layers by name."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, NormLayer)}


def values_per_statistic(layer: nn.Module, shape: torch.Size) -> int:
    """Over how many values a layer takes a mean, for an input of `shape` (N, C, H, W)."""
    if isinstance(layer, GroupNorm):
        return prod(shape[1:]) // layer.num_groups
    batch = isinstance(layer, BatchLayer)
    return prod(shape[2:]) * (shape[0] if batch else 1)


def fault(layer: Any, values: int | None = None, gap: float | None = None) -> str:
    """What is wrong with a norm layer, or nothing.

    values: per statistic, where known. gap: between running and batch statistics (`gaps`).
    """
    tensors = {
        name: getattr(layer, name).detach().float()
        for name in ("weight", "bias", "running_mean", "running_var")
        if getattr(layer, name, None) is not None
    }
    if values is not None and values <= 1:
        return "collapsed: one value per statistic"
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return f"exploding: {name} is not finite"
        if name in ("weight", "bias") and tensor.abs().max() > EXPLODING:
            return f"exploding: {name} up to {float(tensor.abs().max()):.1e}"
    if "weight" in tensors:
        dead = float((tensors["weight"].abs() < DEAD).float().mean())
        if dead >= 0.5:
            return f"dead weights: {dead:.0%} below {DEAD}"
    if "running_var" in tensors and int(layer.num_batches_tracked or 0) > 0:
        if not tensors["running_mean"].any() and (tensors["running_var"] == 1).all():
            return "running statistics never moved"
    if gap is not None and gap > FAR:
        return (
            f"running statistics far from the batch's ({gap:.1f}): training and evaluation differ"
        )
    return ""


@contextmanager
def gaps(networks: Mapping[str, nn.Module]) -> Iterator[Gaps]:
    """Fills in, by layer, how far running statistics are from the inputs' inside the block.

    For layers in evaluation mode with running statistics: the median channel's
    |mean - running_mean| / std or |log(var / running_var)|, whichever is larger.
    """
    gap: Gaps = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            if name not in gap and inputs[0].device.type != "meta":
                x = inputs[0].detach().float()
                var, mean = torch.var_mean(x, (0, 2, 3))
                running_mean, running_var = layer.running_mean.float(), layer.running_var.float()
                var, running_var = var + layer.eps, running_var + layer.eps
                off = (mean - running_mean).abs() / var.sqrt()
                gap[name] = float(torch.maximum(off, (var / running_var).log().abs()).median())

        return look

    handles = [
        layer.register_forward_pre_hook(hook(f"{net}.{name}"))
        for net, network in networks.items()
        for name, layer in norm_layers(network).items()
        if getattr(layer, "running_mean", None) is not None and not layer.training
    ]
    try:
        yield gap
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def input_statistics(networks: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fills in LAYER/input_mean and LAYER/input_std, each plane's (N*C,), inside the block.

    For layers without running statistics, at their first call: what these are to the others.
    """
    statistics: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if f"{name}/input_std" not in statistics:
                std, mean = torch.std_mean(inputs[0].detach().float(), (2, 3))
                statistics[f"{name}/input_mean"] = mean.flatten()
                statistics[f"{name}/input_std"] = std.flatten()

        return look

    handles = [
        layer.register_forward_pre_hook(hook(f"{net}.{name}"))
        for net, network in networks.items()
        for name, layer in norm_layers(network).items()
        if getattr(layer, "running_mean", None) is None
    ]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


COLUMNS = (
    "layer", "kind", "channels", "values", "weight", "bias", "running mean", "running var",
    "verdict",
)  # fmt: skip


def table(
    networks: Mapping[str, nn.Module], shapes: Mapping[str, torch.Size], gap_of: Gaps
) -> list[tuple[str, ...]]:
    """A row of COLUMNS for every norm layer; ranges are "smallest to largest".

    shapes: of each layer's input, by name; gap_of: what `gaps` filled in.
    """
    rows = []
    for net, network in networks.items():
        for name, layer in norm_layers(network).items():
            full = f"{net}.{name}"
            # An average has the shapes of what it averages.
            values = values_per_statistic(layer, shapes[full.removeprefix(AVERAGED)])
            channels = getattr(layer, "num_channels", None) or layer.num_features
            ranges = [
                _range(getattr(layer, key, None))
                for key in ("weight", "bias", "running_mean", "running_var")
            ]
            verdict = fault(layer, values, gap_of.get(full)) or "ok"
            kind = type(layer).__name__
            rows.append((full, kind, str(channels), str(values), *ranges, verdict))
    return rows


def _range(tensor: Tensor | None) -> str:
    if tensor is None:
        return "-"
    low, high = (float(t) for t in tensor.detach().float().aminmax())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def render(rows: list[tuple[str, ...]]) -> str:
    """Rows under their COLUMNS, aligned."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
