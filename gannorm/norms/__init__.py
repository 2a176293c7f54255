"""The norm library: layers, ops, `convert`. It needs torch, and Triton for its GPU kernels."""

from gannorm.norms.backend import use_backend
from gannorm.norms.convert import convert
from gannorm.norms.layers import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm2d,
)

__all__ = [
    "BatchNorm2d",
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm2d",
    "convert",
    "use_backend",
]
