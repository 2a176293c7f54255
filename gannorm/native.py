"""The norms on an eager CPU: `native.c`, compiled by the machine's own C compiler at first use.

A norm made of torch ops reads and writes its tensors ten times and more; these kernels read the
input once, for what they look at again still lies in the cache. Compiling takes about two seconds,
once for each machine: the library is kept beside the extractors' cache. It shares torch's threads.
Where there is no compiler, or on another system than Linux, `gannorm.reference` serves.

Tried and dropped: torch's own group and batch norm kernels in clever order: up to 5 times slower,
exact only near 0, and only for float32. `torch.compile` would compile anew for every shape.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gannorm.reference import NormSpec, Running, stat_dtype

SOURCE = Path(__file__).with_name("native.c")
INCLUDED = Path(__file__).with_name("native_real.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as the source's enum
ACTIVATIONS = (None, "relu", "leaky_relu", "silu")

_int, _real, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, _int) for name in ("n", "c", "s", "groups", "rows")),
        *((name, _int) for name in ("dtype", "activation", "residual_after", "threads")),
        *((name, _real) for name in ("eps", "slope", "momentum", "bessel")),
        *(
            (name, _int)
            for t in ("x", "residual", "y", "dy", "dx", "g")
            for name in (t, f"{t}_sample")
        ),
        *((name, _pointer) for name in ("stats", "mean", "var", "weight", "bias", "labels")),
        *((name, _pointer) for name in ("running_mean", "running_var")),
        *((name, _pointer) for name in ("dweight", "dbias", "rstd", "sums")),
        *((name, _int) for name in ("own", "width")),
    ]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or not compiler or shutil.which(compiler[0]) is None:
        return None
    try:
        built = _build(compiler)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{shlex.join(compiler)} could not compile {SOURCE.name}; norms on the CPU run on "
            f"torch ops, slower: {said.strip()[:300]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _build(compiler: list[str]) -> Path:
    """Compile the source, unless this machine has a library of the same source and processor."""
    folder = Path(os.environ.get("GANNORM_CACHE", "~/.cache/gannorm")).expanduser()
    source = SOURCE.read_bytes() + INCLUDED.read_bytes()
    processor = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line.lower()
         or line.startswith("Features")),
        platform.machine(),
    )  # fmt: skip
    known = "\n".join((*compiler, *FLAGS, processor, platform.platform()))
    key = hashlib.sha256(source + known.encode()).hexdigest()[:16]
    path = folder / f"native-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # then moved: whole, or not there
            made = Path(scratch) / path.name
            command = [*compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)
    return path


def serves(x: Tensor) -> bool:
    """Whether these kernels take `x`."""
    compiled = kernels() if x.dtype in DTYPES and x.numel() else None
    return compiled is not None and (x.dtype != torch.float16 or bool(compiled.norm_float16()))


def _dense(t: Tensor) -> Tensor:
    """`t` (N, C, S) with every sample dense."""
    t = t.resolve_neg()  # of an imaginary part
    if not t.data_ptr() and t.numel():
        # Zeros of autograd's that have no memory.
        t = t + torch.zeros((), dtype=t.dtype, device=t.device)
    _, c, s = t.shape
    _, between, inner = t.stride()
    return t if (inner == 1 or s == 1) and (between == s or c == 1) else t.contiguous()


def _table(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype is dtype and t.is_contiguous() and not t.is_neg()):
        return t
    return t.detach().to(dtype).contiguous().resolve_neg()


def _pointed(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, labels: Tensor | None,
    residual: Tensor | None, spec: NormSpec,
) -> tuple[_Norm, Any]:  # fmt: skip
    """The call's description, and what it points to."""
    dtype = stat_dtype(x.dtype)
    n, c, s = x.shape
    weight, bias = _table(weight, dtype), _table(bias, dtype)
    labels = None if labels is None else labels.contiguous()
    groups, eps, activation, slope, after = spec
    rows = next((len(t) for t in (weight, bias) if t is not None), 2**62)
    p = _Norm(
        n, c, s, groups, rows, DTYPES.index(x.dtype), ACTIVATIONS.index(activation), after,
        torch.get_num_threads(), eps, slope, 0.0, 0.0, x.data_ptr(), x.stride(0),
    )  # fmt: skip
    p.weight, p.bias, p.labels = _pointed(weight), _pointed(bias), _pointed(labels)
    if residual is not None:
        residual = _dense(residual)
        p.residual, p.residual_sample = residual.data_ptr(), residual.stride(0)
    return p, (weight, bias, labels, residual)


def _run(name: str, p: _Norm) -> None:
    compiled = kernels()
    assert compiled is not None
    failed = getattr(compiled, name)(ctypes.byref(p))
    if failed == 2:
        raise IndexError(f"a label lies outside of the table's rows 0..{p.rows - 1}")
    if failed:
        raise MemoryError(f"no memory for the partial sums of a norm over {p.n} x {p.c} planes")


def forward(
    x: Tensor,  # (N, C, S)
    weight: Tensor | None,  # (K, C)
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,  # (N, C, S)
    given: tuple[Tensor, Tensor] | None,
    spec: NormSpec,
    running: Running | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.forward`; moves the running statistics (contiguous, of x's kind) too."""
    dtype, (n, c, s) = stat_dtype(x.dtype), x.shape
    x = _dense(x)
    p, _kept = _norm(x, weight, bias, labels, residual, spec)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty(
        (4, n, spec.groups) if spec.groups else (4, c), dtype=dtype, device=x.device
    )
    rstd = torch.empty(stats.shape[1:], dtype=torch.float64, device=x.device)
    p.y, p.y_sample, p.stats, p.rstd = y.data_ptr(), c * s, stats.data_ptr(), rstd.data_ptr()
    if given is not None:
        mean, var = _table(given[0], dtype), _table(given[1], dtype)
        p.mean, p.var = _pointed(mean), _pointed(var)
    if running is not None:
        p.running_mean, p.running_var = (_pointed(t) for t in running[:2])
        p.momentum, p.bessel = running[2:]
    _run("norm_forward", p)
    return y, stats


def backward(
    dy: Tensor,  # (N, C, S)
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
    """As `reference.backward`; no g where nobody needs it."""
    n, c, s = x.shape
    x, dy, stats = _dense(x), _dense(dy.to(x.dtype)), stats.contiguous()
    p, _kept = _norm(x, weight, bias, labels, residual, spec)
    sums = torch.empty((2, n, c), dtype=torch.float64, device=x.device)
    p.dy, p.dy_sample = dy.data_ptr(), dy.stride(0)
    p.stats, p.sums = stats.data_ptr(), sums.data_ptr()
    dx, g = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
             for wanted in (need_dx, residual is not None))  # fmt: skip
    if dx is not None:
        p.dx, p.dx_sample = dx.data_ptr(), c * s
    if g is not None:
        p.g, p.g_sample = g.data_ptr(), c * s
    if given:
        p.mean = stats.data_ptr()  # to say that they were
    grads = [None if t is None else stats.new_zeros(t.shape) for t in (weight, bias)]
    p.dweight, p.dbias = (_pointed(t) for t in grads)
    _run("norm_backward", p)
    dweight, dbias = (
        None if grad is None or t is None else grad.to(t.dtype)
        for grad, t in zip(grads, (weight, bias), strict=True)
    )
    return dx, dweight, dbias, g
