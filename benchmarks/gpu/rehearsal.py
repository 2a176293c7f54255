"""The same code without a GPU: Triton's interpreter, and stand-ins for the parts of torch.cuda that
the benchmarks use. What they compute on the CPU is real; their times mean nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl


@contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest, ties to even."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            bits = torch.from_numpy(src.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16), tl.bfloat16)
        return truncate(self, src, dst_type)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc
    try:
        yield
    finally:
        InterpreterBuilder.create_fp_trunc = truncate


@contextmanager
def patching_once() -> Iterator[None]:
    """A launch makes triton.language the interpreter's, and each function that a kernel calls does
    it again, which takes longer than the function: here the launch does it for all of them."""
    from triton.runtime import interpreter

    patch, launched = interpreter._patch_lang, list[Any]()
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def restore() -> None:
        launched.pop().restore()

    def patch_once(fn: Any) -> Any:
        if launched:
            return SimpleNamespace(restore=lambda: None)
        launched.append(patch(both))
        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


@contextmanager
def without_overflow_checks() -> Iterator[None]:
    """As compiled: without `debug` no kernel looks for overflows of its integers; the interpreter
    works every check out, and drops it."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    options = builder.options
    builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options


class Event:
    """Of torch.cuda.Event: stamps the clock when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


class Stream:
    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: "Stream") -> None: ...

    def synchronize(self) -> None: ...


class CUDAGraph:
    """A replay finds the results of the capture in place."""

    def replay(self) -> None: ...


@contextmanager
def standing_in() -> Iterator[None]:
    """torch.cuda as far as the benchmarks ask it for clocks, streams, graphs and memory."""
    parts = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph: nullcontext(),
        "current_stream": Stream,
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: SimpleNamespace(L2_cache_size=2**16),
        "max_memory_allocated": lambda device=None: 2**20,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    before = {name: getattr(torch.cuda, name) for name in parts}
    vars(torch.cuda).update(parts)
    try:
        yield
    finally:
        vars(torch.cuda).update(before)
