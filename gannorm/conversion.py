"""Put our norms into an existing model."""

from typing import Any

import torch
from torch import nn

from gannorm.norms import BatchNorm2d, GroupNorm, InstanceNorm2d

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu"}


def convert(module: nn.Module, fuse: bool = True) -> nn.Module:
    """Swap every BatchNorm2d, InstanceNorm2d and GroupNorm of torch's below `module` for ours.

    Parameters and buffers are the same objects as before, under the same keys. With `fuse`, a
    ReLU or LeakyReLU that directly follows a norm in an `nn.Sequential` runs inside the norm; an
    `nn.Identity` keeps its place. Subclasses of torch's norms (SyncBatchNorm, lazy ones) are left
    as they are. Works in place; returns the module, or its replacement if it is a norm itself.
    """
    twin = _twin(module)
    if twin is not None:
        return twin
    for name, child in module.named_children():
        replacement = convert(child, fuse)
        if replacement is not child:
            module._modules[name] = replacement
    if fuse and type(module) is nn.Sequential:
        for norm, follower in zip(list(module), list(module)[1:], strict=False):
            if isinstance(norm, BatchNorm2d | InstanceNorm2d | GroupNorm):
                _fuse(module, norm, follower)
    return module


def _twin(norm: nn.Module) -> nn.Module | None:
    """Ours for one of torch's norms, sharing its tensors; None for anything else."""
    ours: nn.Module
    with torch.device("meta"):  # its own tensors are dropped at once
        if type(norm) is nn.BatchNorm2d:
            ours = BatchNorm2d(norm.num_features, *_common(norm))
        elif type(norm) is nn.InstanceNorm2d:
            ours = InstanceNorm2d(norm.num_features, *_common(norm))
        elif type(norm) is nn.GroupNorm:
            ours = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        else:
            return None
    ours._parameters, ours._buffers = norm._parameters, norm._buffers
    return ours.train(norm.training)


def _common(norm: Any) -> tuple[Any, ...]:
    return norm.eps, norm.momentum, norm.affine, norm.track_running_stats


def _fuse(
    parent: nn.Sequential, norm: BatchNorm2d | InstanceNorm2d | GroupNorm, follower: nn.Module
) -> None:
    activation = ACTIVATIONS.get(type(follower))
    if activation is None or norm.epilogue.activation is not None:
        return
    norm.fuse(activation, getattr(follower, "negative_slope", 0.2))
    for name, child in parent.named_children():
        if child is follower:
            parent._modules[name] = nn.Identity()
