"""What the ops refuse: each check names the argument, its value and the way out."""

import math

import torch
from torch import Tensor


def check_input(x: Tensor, op: str, minimum_dim: int = 2) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: input must be a floating-point tensor, got {kind}")
    if x.dim() < minimum_dim:
        raise ValueError(
            f"{op}: input must have at least {minimum_dim} dimensions (N, C, ...), "
            f"got shape {tuple(x.shape)}"
        )


def check_vector(t: Tensor | None, name: str, channels: int, op: str) -> None:
    if t is not None and tuple(t.shape) != (channels,):
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


def check_tables(
    weight: Tensor | None, bias: Tensor | None, labels: Tensor, x: Tensor, op: str
) -> None:
    channels = x.shape[1]
    rows = None
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dim() != 2 or t.shape[1] != channels or rows not in (None, t.shape[0]):
            raise ValueError(
                f"{op}: {name} must have shape (num_classes, {channels}), the same for weight and "
                f"bias, got {tuple(t.shape)}"
            )
        rows = t.shape[0]
    if labels.dtype != torch.int64 or tuple(labels.shape) != (x.shape[0],):
        kind = TypeError if labels.dtype != torch.int64 else ValueError
        raise kind(
            f"{op}: labels must be an int64 tensor of shape ({x.shape[0]},), one label per sample, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if rows is None or not labels.numel():
        return
    if torch.compiler.is_compiling():
        fits = ((labels >= 0) & (labels < rows)).all()
        torch._assert_async(fits, f"{op}: labels must lie in 0..{rows - 1}")
    elif labels.device.type == "cpu":  # on a GPU reading them would wait for the device
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= rows:
            raise ValueError(
                f"{op}: labels must lie in 0..{rows - 1} (num_classes={rows}), got {low}..{high}"
            )


def check_plane(x: Tensor, op: str) -> None:
    if x.dim() > 2 and x[:1].numel() and math.prod(x.shape[2:]) == 1:
        raise ValueError(
            f"{op}: one value per plane has no variance (input of shape {tuple(x.shape)}, "
            "H*W = 1); use a larger image, fewer downsamplings, or another norm"
        )
