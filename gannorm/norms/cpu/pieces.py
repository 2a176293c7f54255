"""A batch norm in pieces, by the C kernels (see `gannorm.norms.pieces`)."""

from collections.abc import Callable

import torch
from torch import Tensor

from gannorm.norms.composed import NormSpec, planes, shaped, stat_dtype
from gannorm.norms.cpu import (
    ACTIVATIONS,
    DTYPES,
    _address,
    _dense,
    _like,
    _rows,
    _run,
    _table,
    is_dense,
    is_last,
)
from gannorm.norms.cpu.build import pack
from gannorm.norms.pieces import Grads, merge

__all__ = ["apply", "merge", "moments", "sums"]


def _is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and is_last(x)


def _packed(
    x: Tensor, spec: NormSpec, *, rows: int = 1, residual: Tensor | None = None,
    y: Tensor | None = None, dy: Tensor | None = None, dx: Tensor | None = None,
    g: Tensor | None = None, stats: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, labels: Tensor | None = None, dweight: Tensor | None = None,
    dbias: Tensor | None = None, shared: Tensor | None = None,
) -> bytes:  # fmt: skip
    n, c = x.shape[:2]
    places = [
        number
        for t in (x, residual, y, dy, dx, g)
        for number in ((0, 0) if t is None else (t.data_ptr(), t.stride(0)))
    ]
    return pack(
        n, c, x.numel() // (n * c), 0, rows, DTYPES.index(x.dtype),
        ACTIVATIONS.index(spec.activation), spec.residual_after_activation,
        torch.get_num_threads(), _is_last(x), spec.eps, spec.negative_slope, 0.0, 0.0, *places,
        *map(_address, (stats, None, None, weight, bias, labels, None, None, dweight, dbias)),
        _address(shared),
    )  # fmt: skip


def moments(x: Tensor) -> Tensor:
    """As `gannorm.norms.pieces.moments`."""
    if x.dim() != 3 and not is_dense(x):
        return moments(planes(x))
    x, c = _dense(x), x.shape[1]
    found = torch.empty(1 + 2 * c, dtype=torch.float64)
    found[0] = x.numel() // c
    _run("norm_forward", 1, _packed(x, NormSpec(0, 1.0), shared=found[1:]))
    return found


def apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, spec: NormSpec,
) -> Tensor:  # fmt: skip
    """As `gannorm.norms.pieces.apply`."""
    if x.dim() != 3 and not is_dense(x):
        added = None if residual is None else planes(residual)
        return shaped(apply(planes(x), weight, bias, labels, added, stats, spec), x)
    x, dtype = _dense(x), stat_dtype(x.dtype)
    weight, bias = _table(weight, dtype), _table(bias, dtype)
    rows, y = _rows(weight, bias), _like(x, _is_last(x))
    _run("norm_apply", rows, _packed(
        x, spec, rows=rows, residual=None if residual is None else _dense(residual, x), y=y,
        stats=stats, weight=weight, bias=bias, labels=_table(labels, torch.int64),
    ))  # fmt: skip
    return y


def sums(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, stats: Tensor, spec: NormSpec,
) -> tuple[Tensor, Callable[[Tensor], Grads]]:  # fmt: skip
    """As `gannorm.norms.pieces.sums`."""
    if x.dim() != 3 and not is_dense(x):
        added = None if residual is None else planes(residual)
        totals, inner = sums(planes(dy), planes(x), weight, bias, labels, added, stats, spec)

        def reshaped(means: Tensor) -> Grads:
            dx, dweight, dbias, g = inner(means)
            dx, g = (None if t is None else shaped(t, x) for t in (dx, g))
            return dx, dweight, dbias, g

        return totals, reshaped
    x, dtype, stats = _dense(x), stat_dtype(x.dtype), stats.contiguous()
    dy = _dense(dy if dy.dtype is x.dtype else dy.to(x.dtype), x)
    gain, shift = _table(weight, dtype), _table(bias, dtype)
    residual = None if residual is None else _dense(residual, x)
    last = _is_last(x)
    # Both calls get the same: between them g lies in its own place or in dx.
    dx, g = _like(x, last), None if residual is None else _like(x, last)
    dweight, dbias = (None if t is None else torch.empty_like(t) for t in (gain, shift))
    totals = torch.empty((2, x.shape[1]), dtype=torch.float64)
    rows, numbers = _rows(gain, shift), _table(labels, torch.int64)

    def run(name: str, shared: Tensor) -> None:
        _run(name, rows, _packed(
            x, spec, rows=rows, residual=residual, dy=dy, dx=dx, g=g, stats=stats, weight=gain,
            bias=shift, labels=numbers, dweight=dweight, dbias=dbias, shared=shared,
        ))  # fmt: skip

    run("norm_backward", totals)

    def finish(means: Tensor) -> Grads:
        run("norm_dx", means.contiguous())
        made, also = (
            None if grad is None or t is None else grad.to(t.dtype)
            for grad, t in ((dweight, weight), (dbias, bias))
        )
        return dx, made, also, g

    return totals, finish
