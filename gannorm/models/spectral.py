"""Spectral norm (Miyato et al., 2018): torch's, whose power iteration can be told when to move."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm


class SpectralNorm(_SpectralNorm):
    """A weight (K, ...) divided by its largest singular value, as a matrix (K, -1).

    torch moves the vectors of the power iteration in every forward pass of a training module. A
    GAN's step has several for one change of the weights.

    Attributes:
        by_hand: they do not.
    """

    by_hand = False

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        if self.training and not self.by_hand:
            self._power_method(matrix, 1)
        u, v = self._u.clone(), self._v.clone()  # two passes, then two backward: see torch's
        return weight / torch.dot(u, torch.mv(matrix, v))


def add_spectral_norm(layer: nn.Module) -> None:
    """On the weight of a convolution, a linear layer or an embedding."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parametrize.register_parametrization(layer, "weight", SpectralNorm(weight))


def by_hand(net: nn.Module) -> Callable[[], None]:
    """What moves the spectral norms in `net` by one power iteration; nothing else does any more."""
    lists = [m for m in net.modules() if isinstance(m, parametrize.ParametrizationList)]
    norms = [(part, each) for each in lists for part in each if isinstance(part, SpectralNorm)]
    for norm, _ in norms:
        norm.by_hand = True

    def move() -> None:
        for norm, each in norms:
            norm._power_method(each.original.detach().flatten(1), 1)

    return move
