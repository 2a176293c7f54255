"""GAN training on Triton normalization kernels.

The norm layers stand here; the ops are in `gannorm.functional`. Training needs the extra `train`.
"""

from typing import Any

from gannorm import norms
from gannorm.norms import *  # noqa: F403

__version__ = "0.1.0"

__all__ = norms.__all__ + ["build_norm"]  # noqa: F405


def __getattr__(name: str) -> Any:
    """`build_norm`, imported when asked for: it reads configs, which the layers need not."""
    if name == "build_norm":
        from gannorm.models.norm_factory import build_norm

        return build_norm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
