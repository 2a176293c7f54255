"""A batch norm in pieces, between which processes exchange what they have of the batch: torch ops.

`gannorm.norms.sync` puts them together. `gannorm.norms.cpu.pieces` and `gannorm.kernels.pieces`
have the same four. Statistics are (5, C): those of `composed.statistics`, and the count of a
channel's values in all processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gannorm.norms import composed
from gannorm.norms.composed import NormSpec, Running, planes, shaped, stat_dtype

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def moments(x: Tensor) -> Tensor:
    """Of x (N, C, ...): the count of a channel's values, means, sums of squares around them.

    (1 + 2C,) float64, which holds the square of whatever float32 does.
    """
    c = x.shape[1]
    if not x.numel():
        return x.new_zeros(1 + 2 * c, dtype=torch.float64)
    count = x.numel() // c
    mean, error, scaled, unit, _ = composed.spread(planes(x).to(stat_dtype(x.dtype)), 0)
    square = scaled.double() * count
    if unit is not None:
        square = square / unit.double().square()
    return torch.cat((square.new_full((1,), count), mean.double() + error, square))


def merge(
    everyone: Tensor,  # (processes, 1 + 2C): their `moments`
    running: Running,  # not moved here
    eps: float,
    dtype: torch.dtype,
    unbiased: bool,  # the running variance
) -> tuple[Tensor, bool]:
    """The statistics (5, C), and whether the running ones were moved.

    Chan's merge, in float64 and around a mean that is one of them: equal ones stay what they are.
    """
    counts = everyone[:, :1]
    means, squares = everyone[:, 1:].chunk(2, 1)
    count = counts.sum()
    centre = means.index_select(0, counts.argmax(0))  # of a process that has values
    apart = torch.where(counts > 0, means - centre, 0.0)
    offset = (apart * counts).sum(0) / count
    mean = centre[0] + offset
    square = (squares + counts * (apart - offset).square()).sum(0)
    rounded, var = mean.to(dtype), square / count
    rows = rounded.double(), mean - rounded, (var + eps).rsqrt(), var, count.expand_as(var)
    return torch.stack(rows).to(dtype), False


def apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, spec: NormSpec,
) -> Tensor:  # fmt: skip
    """y by the statistics of all processes."""
    added = None if residual is None else planes(residual)
    centred = planes(x).to(stats.dtype) - stats[0].view(1, -1, 1)
    y = composed.applied(centred, stats, weight, bias, labels, added, None, spec)
    return shaped(y.to(x.dtype), x)


def sums(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, spec: NormSpec,
) -> tuple[Tensor, Callable[[Tensor], Grads]]:  # fmt: skip
    """Sums of gain * g and of that times x_hat, (2, C) float64; and what makes the gradients (those
    of `composed.backward`) of their means over all processes' elements."""
    added = None if residual is None else planes(residual)
    x_hat, g, gain, rstd, *each = composed.gradient_sums(
        planes(dy), planes(x), weight, bias, labels, added, stats, spec
    )
    row = 1.0 if gain is None else gain.squeeze(-1).double()
    g_sum, gx_sum = each
    totals = torch.stack([(t.double() * row).sum(0) for t in each])

    def finish(means: Tensor) -> Grads:
        a, b = means.to(g.dtype)
        dx = composed.input_gradient(g, x_hat, gain, rstd, a, b, spec).to(x.dtype)
        dweight = composed.table_grad(gx_sum, weight, labels)
        dbias = composed.table_grad(g_sum, bias, labels)
        return shaped(dx, x), dweight, dbias, shaped(g.to(dy.dtype), x)

    return totals, finish
