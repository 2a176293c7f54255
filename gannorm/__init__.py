"""GAN training on Triton normalization kernels.

The norm layers stand here; the ops are in `gannorm.functional`.
"""

from gannorm.conversion import convert
from gannorm.functional import use_backend
from gannorm.norms import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm2d,
    build_norm,
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
