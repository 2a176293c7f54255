"""Standing statistics: running statistics of one and the same set of weights (BigGAN)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def renew_statistics(net: nn.Module, forwards: list[Callable[[], Any]]) -> None:
    """Replace the running statistics of `net`'s batch norms by their average over `forwards`.

    Brock et al. (2019), section 4.1. While training, a running statistic averages those of past
    weights; each of `forwards` runs the net as it is on another batch. Nothing else of it is in
    training mode then, and a net without running statistics stays as it is.
    """
    norms: list[Any] = [m for m in net.modules() if getattr(m, "running_mean", None) is not None]
    if not norms or not forwards:
        return
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.num_batches_tracked.zero_()
        norm.momentum = None  # the plain average
        norm.train()
    for forward in forwards:
        forward()
    for norm, momentum, training in before:
        norm.momentum = momentum
        norm.train(training)
