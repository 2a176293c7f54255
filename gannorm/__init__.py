"""GAN training on Triton normalization kernels.

The norm layers stand here; the ops are in `gannorm.norms.functional`.
"""

from typing import Any

from gannorm.norms import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm2d,
    convert,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "BatchNorm2d",
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm2d",
    "build_norm",
    "convert",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`build_norm`, imported when asked for: it reads configs, and the layers need no Hydra."""
    if name == "build_norm":
        from gannorm.models.norm_factory import build_norm

        return build_norm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
