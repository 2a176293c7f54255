"""The public ops, by their short name (see `gannorm.norms.functional`)."""

from gannorm.norms.functional import *  # noqa: F403
from gannorm.norms.functional import __all__ as __all__
