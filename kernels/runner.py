"""Compiled kernels by what they were compiled for, called with addresses alone."""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


class Kernel:
    """A kernel at one grid, with its integers and constants.

    Triton's own dispatch examines every argument of every call. Here all calls have the first
    one's dtypes and the same pointers None; only their alignment is looked at.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], warps: int, numbers: tuple[int, ...],
        constants: tuple[Any, ...], device: torch.device,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.warps, self.device = kernel, grid, warps, device
        self.rest = (*numbers, *constants)
        self.compiled: dict[tuple[bool, ...], Any] = {}  # by which pointers are aligned
        self.one_device = device.type != "cuda" or torch.cuda.device_count() == 1

    def __call__(self, pointers: tuple[Tensor | None, ...], floats: tuple[float, ...] = ()) -> None:
        if self.one_device or torch.cuda.current_device() == self.device.index:
            self._launch(pointers, floats)
        else:
            with torch.cuda.device(self.device):
                self._launch(pointers, floats)

    def _launch(self, pointers: tuple[Tensor | None, ...], floats: tuple[float, ...]) -> None:
        addresses = [None if p is None else p.data_ptr() for p in pointers]
        bits = 0
        for address in addresses:
            if address is not None:
                bits |= address
        aligned = () if not bits & 15 else tuple([a is None or not a & 15 for a in addresses])
        compiled = self.compiled.get(aligned)
        if compiled is not None:
            compiled(*addresses, *floats, *self.rest)
            return
        made = self.kernel[self.grid](*pointers, *floats, *self.rest, **_options(self.warps))
        if hasattr(made, "run"):  # not in the interpreter
            self.compiled[aligned] = _runner(made, self.grid, self.device.index or 0)


def _runner(compiled: Any, grid: tuple[int, int, int], device: int) -> Any:
    """`compiled[grid]`, less the description of each launch that only a profiler reads."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream, runtime, described = driver.active.get_current_stream, knobs.runtime, compiled[grid]
    x, y, z = grid

    def runner(*arguments: Any) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            described(*arguments)
        else:
            run(x, y, z, stream(device), function, metadata, None, None, None, *arguments)

    return runner


def _options(warps: int) -> dict[str, int]:
    """Left alone, NVIDIA's assembler spills a few registers to fit more programs on a processor."""
    if knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {"num_warps": warps}
    return {"num_warps": warps, "maxnreg": min(255, 2048 // warps)}
