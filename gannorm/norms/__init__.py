"""The norm library: layers, ops, `convert`. It needs torch, and Triton for its GPU kernels."""

from gannorm.norms.backend import use_backend
from gannorm.norms.convert import convert, convert_sync
from gannorm.norms.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm2d,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm2d",
    "convert",
    "convert_sync",
    "use_backend",
]
