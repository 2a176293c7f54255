"""Put our norms into an existing model.

The norms become ours; what is fused is decided anew in every call by the module that runs a norm
and its activation one after the other: a Sequential, or a block of torchvision's ResNets. All
modules stay what and where they are, so whatever is done to them later (hooks, indices, slices,
another norm in the place) means what it meant.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from gannorm.norms import layers, sync
from gannorm.norms.base import BatchLayer, Epilogue, NormLayer

log = logging.getLogger(__name__)

NAMES = (
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d",
    "InstanceNorm3d", "GroupNorm",
)  # fmt: skip
OURS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(layers, name) for name in NAMES
}
FUSABLE = (*OURS.values(), layers.LayerNorm2d)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def convert(module: nn.Module) -> nn.Module:
    """Turn every BatchNorm, InstanceNorm (1d, 2d, 3d) and GroupNorm of torch's in `module` to ours.

    Works in place and returns the module. A norm stays the same object and becomes of our class,
    so parameters, buffers, hooks, mode, device and dtype stay as they are. What is left alone is
    logged by its name, with the reason: other norms, subclasses, norms that are lazy or
    parametrized, or whose `forward` was replaced.

    A ReLU, LeakyReLU or SiLU behind a norm in a Sequential runs inside the norm, and so does the
    addition in torchvision's ResNet blocks. Both modules stay in their places; with a hook on
    either, they run one after the other.
    """
    left: dict[str, list[str]] = defaultdict(list)
    for name, norm in module.named_modules():
        if why := _why_not(norm):
            left[why].append(name or type(norm).__name__)
        elif type(norm) in OURS:
            norm.__class__ = OURS[type(norm)]  # torch's state is ours; the rest is in our class
            norm.eps = norm.__dict__["eps"]  # but for what a batch norm's property keeps
    for parent in module.modules():
        if "forward" not in parent.__dict__ and any(type(m) in FUSABLE for m in parent.children()):
            kind: Any = type(parent)
            parent.__class__ = _fusing(kind) or kind
    for why, names in left.items():
        log.warning("convert leaves %s as it is (%s)", ", ".join(names), why)
    return module


def convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    """`convert`, and every batch norm of ours in `module` shares its statistics with the others of
    `process_group` in training: all processes (None), a group of torch.distributed's, or its name.

    Works in place and returns the module, before or after torch.distributed begins. What `convert`
    leaves alone stays a norm of one process (a SyncBatchNorm what it is), and is logged.

    Raises:
        ValueError: no group of this name has this process in it.
    """
    name = sync.name_of(sync.WORLD if process_group is None else process_group)
    sync.resolved(name)
    for norm in convert(module).modules():
        if isinstance(norm, BatchLayer):
            norm.process_group = name
    return module


def _why_not(module: nn.Module) -> str | None:
    """Why a norm stays as it is; None if it does not, and for what is no norm."""
    kind = type(module)
    if not isinstance(module, NORMS) or isinstance(module, NormLayer):
        return None
    if isinstance(module, LazyModuleMixin):
        return f"{kind.__name__}: convert it once it has seen an input"
    if is_parametrized(module):
        return "parametrized"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if kind is nn.SyncBatchNorm:
        return "SyncBatchNorm: its statistics are those of several processes"
    if kind in OURS:
        return None
    if kind.__module__.startswith("torch.nn"):
        return f"{kind.__name__}: there is none of ours"
    return f"{kind.__module__}.{kind.__qualname__}: a class of its own"


# --- fused at each call --------------------------------------------------------------------------


def _watched(module: nn.Module) -> bool:
    """Whether a hook sees what goes in or comes out, or `forward` was replaced."""
    return "forward" in module.__dict__ or any(module.__dict__[name] for name in HOOKS)


def _joint(norm: nn.Module, activation: nn.Module) -> Epilogue | None:
    """The epilogue with which `norm` does what both do; None where they have to run apart."""
    name = ACTIVATIONS.get(type(activation))
    if (
        name is None
        or not isinstance(norm, NormLayer)
        or type(norm) not in FUSABLE
        or norm.epilogue.activation is not None
        or _has_any_global_hook()
        or _watched(norm)
        or _watched(activation)
    ):
        return None
    return Epilogue(name, getattr(activation, "negative_slope", 0.2))


def _passes(module: Any) -> bool:
    """Whether nothing happens in `module`, such as a dropout of 0."""
    idle = type(module) in DROPOUTS and (module.p == 0 or not module.training)
    idle = idle or type(module) is nn.Identity
    return idle and not _watched(module) and not _has_any_global_hook()


def _run(norm: Any, behind: Any, x: Any, residual: Any = None) -> Any:
    """behind(norm(x) + residual), in one if that is possible."""
    epilogue = None if isinstance(x, Proxy) else _joint(norm, behind)
    if epilogue is not None:
        return norm(x, residual, epilogue)
    y = norm(x)
    return behind(y if residual is None else y + residual)


class _Fusing(nn.Module):
    """A mixin, in front of the class whose `forward` it replaces."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class that was there before: pickle finds none of the same name in its place."""
        made: Any = super().__reduce_ex__(protocol)
        make, (kind, *arguments), *state = made
        return _make_again, (make, kind.__bases__[1], *arguments), *state


class _Sequential(_Fusing):
    def forward(self, input: Any) -> Any:
        if isinstance(input, Proxy):  # a graph holds every module
            return super().forward(input)
        waiting: Any = None  # a norm, for what comes behind it
        for module in self._modules.values():
            if waiting is not None and _passes(module):
                continue
            if waiting is not None:
                input, waiting = _run(waiting, module, input), None
            elif type(module) in FUSABLE:
                waiting = module
            else:
                input = module(input)  # type: ignore[misc]
        return input if waiting is None else waiting(input)


class _BasicBlock(_Fusing):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))"""

    def forward(self: Any, x: Any) -> Any:
        y = _run(self.bn1, self.relu, self.conv1(x))
        skip = x if self.downsample is None else self.downsample(x)
        return _run(self.bn2, self.relu, self.conv2(y), skip)


class _Bottleneck(_Fusing):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))"""

    def forward(self: Any, x: Any) -> Any:
        y = _run(self.bn1, self.relu, self.conv1(x))
        y = _run(self.bn2, self.relu, self.conv2(y))
        skip = x if self.downsample is None else self.downsample(x)
        return _run(self.bn3, self.relu, self.conv3(y), skip)


BLOCKS: dict[str, type[_Fusing]] = {
    "torchvision.models.resnet.BasicBlock": _BasicBlock,
    "torchvision.models.resnet.Bottleneck": _Bottleneck,
}


@cache
def _fusing(kind: Any) -> type[nn.Module] | None:
    """A class of the same name that fuses, where we know how."""
    fusing = BLOCKS.get(f"{kind.__module__}.{kind.__qualname__}")
    if issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward:
        fusing = _Sequential
    if fusing is None or issubclass(kind, _Fusing):
        return None
    return type(kind.__name__, (fusing, kind), {"__module__": kind.__module__})


def _make_again(make: Callable[..., nn.Module], kind: Any, *arguments: Any) -> Any:
    return make(_fusing(kind), *arguments)
