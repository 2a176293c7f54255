"""What float32 means on a GPU (`trainer.precision`), and cuDNN's search for fast convolutions.

torch lets cuDNN round the inputs of float32 convolutions to TF32 (10 bits of 23) unless told
otherwise. Here fp32 is float32; whoever wants TF32's speed says tf32. Beside half types TF32 is
allowed: it has more bits than they have.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gannorm.schema import TrainerConfig

BACKENDS: Any = torch.backends


@contextmanager
def arithmetic(
    trainer: TrainerConfig, device: torch.device, many_shapes: bool = False
) -> Iterator[None]:
    """Inside, a GPU's float32 is what `trainer.precision` says, and cuDNN looks for the fastest
    convolution once for each shape; not with `many_shapes`, nor if `trainer.deterministic`.
    """
    if device.type != "cuda":
        yield
        return
    # torch's older flags: with its newer ones (fp32_precision) these cannot be read any more, which
    # its compiler does.
    flags = ((BACKENDS.cudnn, "allow_tf32"), (BACKENDS.cuda.matmul, "allow_tf32"),
             (BACKENDS.cudnn, "benchmark"))  # fmt: skip
    before = [getattr(*flag) for flag in flags]
    allowed = trainer.precision != "fp32"
    try:
        _set(flags, [allowed, allowed, not (trainer.deterministic or many_shapes)])
        yield
    finally:
        _set(flags, before)


def _set(flags: Sequence[tuple[Any, str]], values: Sequence[bool]) -> None:
    for (place, name), value in zip(flags, values, strict=True):
        setattr(place, name, value)
