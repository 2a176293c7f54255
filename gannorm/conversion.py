"""Put our norms into an existing model."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from gannorm.norms import BatchNorm2d, GroupNorm, InstanceNorm2d

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu"}


def convert(module: nn.Module, fuse: bool = True) -> nn.Module:
    """Swap every BatchNorm2d, InstanceNorm2d and GroupNorm of torch's below `module` for ours.

    Parameters and buffers are the same objects as before, under the same keys. With `fuse`, a
    ReLU or LeakyReLU that directly follows a norm in an `nn.Sequential` runs inside the norm and
    an `nn.Identity` keeps its place; a norm that stands in several places is not fused.
    Subclasses of torch's norms (SyncBatchNorm, lazy ones) are left as they are. Works in place;
    returns the module, or its replacement if it is a norm itself.
    """
    uses = Counter(id(child) for parent in module.modules() for child in parent._modules.values())
    return _convert(module, fuse, uses, {})


def _convert(
    module: nn.Module, fuse: bool, uses: Counter[int], done: dict[int, nn.Module]
) -> nn.Module:
    """`convert` below one module; `done` gives a module in several places one replacement."""
    if id(module) in done:
        return done[id(module)]
    once = uses[id(module)] <= 1
    done[id(module)] = replacement = _twin(module) or module
    uses[id(replacement)] = 1 if once else 2
    for name, child in replacement._modules.items():
        if child is not None:
            replacement._modules[name] = _convert(child, fuse, uses, done)
    if fuse and type(replacement) is nn.Sequential:
        places = list(replacement._modules)
        for place, behind in zip(places, places[1:], strict=False):
            norm, follower = replacement._modules[place], replacement._modules[behind]
            kinds = BatchNorm2d | InstanceNorm2d | GroupNorm
            if isinstance(norm, kinds) and uses[id(norm)] == 1 and follower is not None:
                if _fuse(norm, follower):
                    replacement._modules[behind] = nn.Identity()
    return replacement


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


def _fuse(norm: BatchNorm2d | InstanceNorm2d | GroupNorm, follower: nn.Module) -> bool:
    """Take a following ReLU or LeakyReLU into the norm, if it is one and there is none yet."""
    activation = ACTIVATIONS.get(type(follower))
    if activation is None or norm.epilogue.activation is not None:
        return False
    norm.fuse(activation, getattr(follower, "negative_slope", 0.2))
    return True
