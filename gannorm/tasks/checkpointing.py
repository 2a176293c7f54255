"""`trainer.checkpointing=true`: activations are made again in the backward pass, not kept.

A network's blocks, and the layers between blocks as one, are run by `torch.utils.checkpoint`. The
second run must be the first one's twin:
- Norms move no running statistics in it (`gannorm.norms`).
- Spectral norms move once a step and in no pass (`gannorm.models.spectral`).
- A GPU's backward pass is another thread, which does not know the norms' backend (a ContextVar).
Classes are changed, not attributes: a copy of such a network checkpoints itself, not the original.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gannorm.models.cyclegan import ResnetBlock
from gannorm.models.resblock import DiscriminatorBlock, PostactBlock, PreactBlock
from gannorm.norms.backend import selected, use_backend

BLOCKS = (ResnetBlock, PreactBlock, PostactBlock, DiscriminatorBlock)


def checkpoint_blocks(net: nn.Module) -> None:
    """From now on `net` keeps the inputs of its blocks alone while it is trained."""
    for module in net.modules():
        if type(module) in BLOCKS:
            module.__class__ = CHECKPOINTED[type(module)]
    layers = getattr(net, "model", None)
    if type(layers) is nn.Sequential:
        layers.__class__ = _Groups


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *inputs: Any) -> Any:
        return run([self], partial(kind.forward, self), *inputs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


CHECKPOINTED: dict[type[nn.Module], type[nn.Module]] = {
    kind: _checkpointed(kind) for kind in BLOCKS
}


class _Groups(nn.Sequential):
    """Layers between blocks are one block."""

    def forward(self, x: Tensor) -> Tensor:
        group: list[nn.Module] = []
        for layer in [*self, None]:
            if layer is not None and not isinstance(layer, BLOCKS):
                group.append(layer)
                continue
            if group:
                x = run(group, partial(_in_turn, group), x)
            x, group = x if layer is None else layer(x), []
        return x


def _in_turn(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def run(modules: list[nn.Module], forward: Callable[..., Any], *inputs: Any) -> Any:
    """forward(*inputs), which are the `modules`; checkpointed where it is differentiated."""
    if not (torch.is_grad_enabled() and modules[0].training):
        return forward(*inputs)
    inner = [each for module in modules for each in module.modules()]
    return checkpoint(
        forward, *inputs, use_reentrant=False,
        context_fn=lambda: (nullcontext(), _Backend(selected())),
        preserve_rng_state=any(isinstance(each, nn.Dropout) for each in inner),
    )  # fmt: skip


class _Backend(AbstractContextManager[None]):
    """The norms' backend inside. May be entered more than once: a penalty looks twice."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.inside = use_backend(self.name)
        self.inside.__enter__()

    def __exit__(self, *_: object) -> None:
        self.inside.__exit__(None, None, None)
