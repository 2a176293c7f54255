"""Put our norms into an existing model."""

import copy
from collections import Counter

from torch import nn

from gannorm.norms.layers import BatchNorm2d, GroupNorm, InstanceNorm2d

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchNorm2d,
    nn.GroupNorm: GroupNorm,
    nn.InstanceNorm2d: InstanceNorm2d,
}
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_load_state_dict_pre_hooks",
)


def convert(module: nn.Module, fuse: bool = True) -> nn.Module:
    """Turn every BatchNorm2d, InstanceNorm2d and GroupNorm of torch's in `module` into ours.

    Works in place and returns the module. A norm stays the same object and becomes of our class,
    so parameters, buffers, hooks, mode, device and dtype stay as they are. All other modules do
    too: other norms, subclasses (lazy and parametrized ones among them), and a norm whose
    `forward` was replaced.

    With `fuse`, a ReLU, LeakyReLU or SiLU directly behind a norm in a plain `nn.Sequential` runs
    inside the norm, and an `nn.Identity` keeps its place. Left alone: a norm that stands in
    several places, and a norm or an activation with hooks. Pass fuse=False where code reads the
    norm's own output out of a Sequential, by an index, a slice or a loop.
    """
    for norm in module.modules():
        if type(norm) in OURS and "forward" not in norm.__dict__:
            norm.__class__ = OURS[type(norm)]  # torch's state is ours; the rest is in our class
    if fuse:
        uses = Counter(id(m) for parent in module.modules() for m in parent._modules.values())
        for parent in list(module.modules()):
            if type(parent) is nn.Sequential:
                _fuse(parent, uses)
    return module


def _fuse(parent: nn.Sequential, uses: Counter[int]) -> None:
    """Take each activation behind a norm into it."""
    places = list(parent._modules)
    for place, behind in zip(places, places[1:], strict=False):
        norm, follower = parent._modules[place], parent._modules[behind]
        activation = ACTIVATIONS.get(type(follower))
        if (
            activation is None
            or follower is None
            or not isinstance(norm, BatchNorm2d | InstanceNorm2d | GroupNorm)
            or norm.epilogue.activation is not None
            or uses[id(norm)] > 1
            or _watched(norm)
            or _watched(follower)
        ):
            continue
        # A copy with the same tensors: whoever else holds the norm (the Sequential that this one
        # is a slice of) goes on with one without the activation.
        fused = copy.copy(norm)
        fused.fuse(activation, getattr(follower, "negative_slope", 0.2))
        parent._modules[place], parent._modules[behind] = fused, nn.Identity()


def _watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes in or comes out, or `forward` was replaced."""
    return "forward" in module.__dict__ or any(module.__dict__[name] for name in HOOKS)
