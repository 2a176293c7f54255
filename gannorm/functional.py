"""The public ops, by their short name (see `gannorm.norms.functional`)."""

from gannorm.norms.functional import (
    batch_norm,
    batch_normalization,
    conditional_batch_norm,
    conditional_instance_norm,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    use_backend,
)

__all__ = [
    "batch_norm",
    "batch_normalization",
    "conditional_batch_norm",
    "conditional_instance_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "moments",
    "use_backend",
]
