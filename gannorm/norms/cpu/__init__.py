"""The norms on an eager CPU: kernels in C (`norm.c`), called on torch's own threads.

A norm made of torch ops reads and writes its tensors ten times and more; these kernels read the
input once, for what they look at again still lies in the cache. Where there is no compiler, or on
another system than Linux, `gannorm.norms.composed` runs.

Tried and dropped: torch's own group and batch norm kernels in clever order: up to 5 times slower,
exact only near 0, and only for float32. `torch.compile` would compile anew for every shape.
"""

import torch
from torch import Tensor

from gannorm.norms.composed import (
    Given,
    NormSpec,
    Running,
    planes,
    shaped,
    stat_dtype,
    update_running,
)
from gannorm.norms.cpu.build import keep_memory, kernels, pack

__all__ = ["NoSuchRow", "backward", "forward", "keep_memory", "kernels", "real", "supports"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the source's enum
ACTIVATIONS = (None, "relu", "leaky_relu", "silu")


def supports(x: Tensor) -> bool:
    """Whether these kernels take `x`."""
    compiled = kernels() if x.dtype in DTYPES and x.numel() else None
    return compiled is not None and (x.dtype != torch.float16 or bool(compiled.norm_float16()))


class NoSuchRow(IndexError):
    """A label is no row of the table."""


def is_dense(x: Tensor) -> bool:
    """Whether `x` is worked on as it lies, in its own shape."""
    return x.is_contiguous() or is_last(x)


def is_last(x: Tensor) -> bool:
    """Whether the channels of `x` (N, C, ...) lie side by side, and nothing between."""
    if x.dim() == 3:
        n, c, s = x.shape
        return x.stride()[1:] == (1, c) and (n == 1 or x.stride(0) == c * s)
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def real(t: Tensor) -> Tensor:
    """`t` with its values in memory as they are."""
    if t.is_neg():  # of an imaginary part
        t = t.resolve_neg()
    if not t.data_ptr() and t.numel():  # zeros of autograd's
        t = t + torch.zeros((), dtype=t.dtype, device=t.device)
    return t


def _dense(t: Tensor, x: Tensor | None = None) -> Tensor:
    """`t` (N, C, ...) with every sample dense; in the layout of `x`, if that has channels last."""
    t = real(t)
    if x is not None and not x.is_contiguous() and is_last(x):
        return t if is_last(t) else torch.empty_like(x, dtype=t.dtype).copy_(t)
    if t.is_contiguous() or (t.dim() == 3 and t[0].is_contiguous()):
        return t
    return t if x is None and is_last(t) else t.contiguous()


def _like(x: Tensor, last: bool) -> Tensor:
    if last:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _table(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`t` (a vector, a table or labels) contiguous."""
    if t is None or (t.dtype is dtype and t.is_contiguous() and not t.is_neg() and t.data_ptr()):
        return t
    return real(t.detach()).to(dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(weight: Tensor | None, bias: Tensor | None) -> int:
    """K, of (K, C); 1 of (C,)."""
    one = bias if weight is None else weight
    return one.shape[0] if one is not None and one.dim() == 2 else 1


def _moves(running: Running, spec: NormSpec, dtype: torch.dtype) -> bool:
    """Whether the kernels move these running statistics."""
    buffers = [t for t in running[:2] if t is not None]
    kinds = [t.dtype is dtype and t.is_contiguous() and not t.is_neg() for t in buffers]
    return not spec.groups and all(kinds)


def _run(name: str, rows: int, norm: bytes) -> None:
    failed = getattr(kernels(), name)(norm)
    if failed == 2:
        raise NoSuchRow(f"a label lies outside of the table's rows 0..{rows - 1}")
    if failed:
        raise MemoryError("no memory for a norm's partial sums")


def forward(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,), or (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # as x
    given: Given | None,
    spec: NormSpec,
    running: Running | None = None,  # to be moved
) -> tuple[Tensor, Tensor]:
    """As `composed.forward`."""
    if x.dim() != 3 and not is_dense(x):
        added = None if residual is None else planes(residual)
        y, stats = forward(planes(x), weight, bias, labels, added, given, spec, running)
        return shaped(y, x), stats
    dtype = stat_dtype(x.dtype)
    x = _dense(x)
    n, c = x.shape[:2]
    groups, eps, activation, slope, after = spec
    weight, bias = _table(weight, dtype), _table(bias, dtype)
    labels = _table(labels, torch.int64)
    residual = None if residual is None else _dense(residual, x)
    last = not x.is_contiguous() and is_last(x)
    rows = _rows(weight, bias)
    mean, var = given or (None, None)
    mean, var = _table(mean, dtype), _table(var, dtype)
    moved = running if running is not None and _moves(running, spec, dtype) else None
    running_mean, running_var, momentum, bessel = moved or (None, None, 0.0, 0.0)
    y = _like(x, last)
    stats = x.new_empty((4, n, groups) if groups else (4, c), dtype=dtype)
    _run("norm_forward", rows, pack(
        n, c, x.numel() // (n * c), groups, rows,
        DTYPES.index(x.dtype), ACTIVATIONS.index(activation), after, torch.get_num_threads(), last,
        eps, slope, momentum, bessel,
        x.data_ptr(), x.stride(0),
        _address(residual), 0 if residual is None else residual.stride(0),
        y.data_ptr(), y.stride(0), 0, 0, 0, 0, 0, 0,
        stats.data_ptr(), _address(mean), _address(var), _address(weight), _address(bias),
        _address(labels), _address(running_mean), _address(running_var), 0, 0, 0,
    ))  # fmt: skip
    if running is not None and moved is None:
        update_running(running, stats)
    return y, stats


def backward(
    dy: Tensor,  # (N, C, ...)
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    spec: NormSpec,
    given: bool,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `composed.backward`; no g where nobody needs it."""
    if x.dim() != 3 and not is_dense(x):
        added = None if residual is None else planes(residual)
        dx, dweight, dbias, g = backward(
            planes(dy), planes(x), weight, bias, labels, added, stats, spec, given, need_dx
        )
        dx, g = (None if t is None else shaped(t, x) for t in (dx, g))
        return dx, dweight, dbias, g
    dtype, x, stats = stat_dtype(x.dtype), _dense(x), stats.contiguous()
    n, c = x.shape[:2]
    dy = _dense(dy if dy.dtype is x.dtype else dy.to(x.dtype), x)
    last = not x.is_contiguous() and is_last(x)
    gain, shift = _table(weight, dtype), _table(bias, dtype)
    rows = _rows(gain, shift)
    labels = _table(labels, torch.int64)
    residual = None if residual is None else _dense(residual, x)
    dx = _like(x, last) if need_dx else None
    g = None if residual is None else _like(x, last)
    dweight = None if gain is None else torch.empty_like(gain)
    dbias = None if shift is None else torch.empty_like(shift)
    each = x.numel() // n
    _run("norm_backward", rows, pack(
        n, c, each // c, spec.groups, rows,
        DTYPES.index(x.dtype), ACTIVATIONS.index(spec.activation), 0, torch.get_num_threads(), last,
        spec.eps, spec.negative_slope, 0.0, 0.0,
        x.data_ptr(), x.stride(0),
        _address(residual), 0 if residual is None else residual.stride(0),
        0, 0, dy.data_ptr(), dy.stride(0), _address(dx), each, _address(g), each,
        stats.data_ptr(), stats.data_ptr() if given else 0, 0,  # a mean: to say that it was given
        _address(gain), _address(shift), _address(labels), 0, 0,
        _address(dweight), _address(dbias), 0,
    ))  # fmt: skip
    if dweight is not None and weight is not None and dweight.dtype is not weight.dtype:
        dweight = dweight.to(weight.dtype)
    if dbias is not None and bias is not None and dbias.dtype is not bias.dtype:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, g
