"""Which code runs the norms: Triton kernels, C kernels, or plain torch ops."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gannorm.errors import RequestError
from gannorm.norms import composed, cpu, pieces
from gannorm.norms.cpu import pieces as cpu_pieces

BACKENDS = ("auto", "triton", "cpu", "torch")
HAS_TRITON = find_spec("triton") is not None
AUTO = os.environ.get("GANNORM_BACKEND", "auto")  # what "auto" means in this process
_backend: ContextVar[str] = ContextVar("backend", default="auto")
_latest = ["auto"]  # for the compiler, which cannot look into a ContextVar before torch 2.12


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the norms inside the block on `name`.

    "triton": the kernels of `gannorm.kernels`; "cpu": those in C; "torch": plain torch ops;
    "auto": Triton for CUDA tensors, C for eager CPU tensors, torch ops for what is left. The
    environment variable GANNORM_BACKEND says what "auto" means instead.

    Raises:
        RequestError: an unknown name, or a backend that cannot run on this machine.
    """
    check_backend(name)
    token, before = _backend.set(name), _latest[0]
    _latest[0] = name
    try:
        yield
    finally:
        _backend.reset(token)
        _latest[0] = before


def selected() -> str:
    """The backend asked for where this is called."""
    return _latest[0] if torch.compiler.is_compiling() else _backend.get()


def _interprets() -> bool:
    """Whether Triton's interpreter is switched on, which runs kernels on CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check_backend(name: str, key: str = "backend") -> None:
    """Refuse a backend that is unknown or cannot run on this machine."""
    if name not in BACKENDS:
        raise RequestError(f"{key}={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "cpu" and cpu.kernels() is None:
        raise RequestError(
            f"{key}='cpu': the C kernels need Linux and a working C compiler (CC, or cc); use "
            "'auto' or 'torch'"
        )
    if name != "triton":
        return
    if not HAS_TRITON:
        raise RequestError(
            f"{key}='triton': triton is not installed here (it exists for Linux); use 'auto' or "
            "'torch'"
        )
    if not torch.cuda.is_available() and not _interprets():
        raise RequestError(
            f"{key}='triton': no GPU was found, and Triton kernels need one; use 'auto' or "
            "'torch', or set TRITON_INTERPRET=1 to interpret the kernels (slowly)"
        )


def module_for(x: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run a call on `x`, which is not `transformed`:
    `gannorm.kernels`, `cpu` or `composed`."""
    name = selected()
    if name == "auto" != AUTO:
        check_backend(AUTO, "GANNORM_BACKEND")
        name = AUTO
    if name == "torch" or x.is_meta:
        return composed
    if name == "cpu" or (name == "auto" and not x.is_cuda):
        if name == "cpu" and not x.is_cpu:
            raise ValueError(
                f"backend='cpu' cannot run on a tensor on {x.device}; move it to the CPU, or use "
                "backend 'auto' or 'torch'"
            )
        # A compiler fuses the plain composition by itself, and the C code needs values.
        eager = x.is_cpu and composed.is_eager(x)
        return cpu if eager and cpu.supports(x) else composed
    if (name == "auto" and not HAS_TRITON) or not x.numel():
        return composed
    if not x.is_cuda and not torch.compiler.is_compiling() and not _interprets():
        raise ValueError(
            f"backend='triton' cannot run on a tensor on {x.device}; move it to a GPU, use backend "
            "'auto' or 'torch', or set TRITON_INTERPRET=1"
        )
    import gannorm.kernels as kernels

    return kernels


def parts_for(tensors: tuple[Tensor | None, ...], spec: composed.NormSpec) -> Any:
    """What runs this process's part of a call with others on `tensors` (as `_decide` has them):
    the same for an empty x, so that statistics are merged to the same bits everywhere."""
    x = tensors[0]
    assert x is not None
    backend = module_for(x if x.numel() else x.new_empty(1))
    if backend is composed:
        return pieces
    return cpu_pieces if backend is cpu else backend.parts(tensors, spec)
