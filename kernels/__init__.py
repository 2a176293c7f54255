"""Triton kernels for the norms, forward and backward, behind two launchers.

This folder is imported as `gannorm.kernels`, through a symbolic link in the package: `kernels`
alone is the name of another project's distribution, which a top-level install would overwrite.

`forward` and `backward` have the signatures of `gannorm.norms.composed`'s; `spec.groups` picks the
statistics: 0 for one channel across the batch, else sets of channels inside each sample. `parts`:
the pieces of a batch norm over processes (`gannorm.norms.sync`).
"""

if __name__ != "gannorm.kernels":
    raise ImportError(f"import this package as gannorm.kernels, not as {__name__}")

from gannorm.kernels.launch import backward, forward, launches
from gannorm.kernels.pieces import parts

__all__ = ["backward", "forward", "launches", "parts"]
