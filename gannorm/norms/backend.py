"""Which code runs the norms: Triton kernels, their torch twin, or differentiable torch ops."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from gannorm.errors import RequestError
from gannorm.norms import composed, cpu

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = find_spec("triton") is not None
_backend: ContextVar[str] = ContextVar("backend", default="auto")
_latest = [
    "auto"
]  # the same for the compiler, which cannot look into a ContextVar before torch 2.12


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the norms inside the block on "triton", "torch", or "auto" (Triton for CUDA tensors).

    Raises:
        RequestError: an unknown name, or "triton" where no kernel can run.
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


def _runs_on_cpu() -> bool:
    """Whether Triton's interpreter is switched on."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def check_backend(name: str) -> None:
    """Refuse a backend that is unknown or cannot run on this machine."""
    if name not in BACKENDS:
        raise RequestError(f"backend={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "triton":
        if not HAS_TRITON:
            raise RequestError(
                "backend='triton': triton is not installed here (it exists for Linux); "
                "use backend 'auto' or 'torch'"
            )
        if not torch.cuda.is_available() and not _runs_on_cpu():
            raise RequestError(
                "backend='triton': no GPU was found, and Triton kernels need one; use backend "
                "'auto' or 'torch', or set TRITON_INTERPRET=1 to interpret the kernels (slowly)"
            )


def module_for(x: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` serve `x`, which is not `transformed`: `kernels`,
    `cpu` or `composed`."""
    name = selected()
    if name == "torch" or x.is_meta or (name == "auto" and not x.is_cuda):
        # A compiler fuses the plain composition by itself, and native code needs values to work on.
        eager = x.is_cpu and composed.is_eager(x)
        return cpu if eager and cpu.serves(x) else composed
    if (name == "auto" and not HAS_TRITON) or not x.numel():
        return composed
    if not x.is_cuda and not torch.compiler.is_compiling() and not _runs_on_cpu():
        raise ValueError(
            f"backend='triton' cannot run on a tensor on {x.device}; move it to a GPU, use backend "
            "'auto' or 'torch', or set TRITON_INTERPRET=1"
        )
    from gannorm import kernels

    return kernels
