"""The two families of networks."""

from gannorm.models.cyclegan import PatchDiscriminator, ResnetGenerator
from gannorm.models.resblock import ProjectionDiscriminator, ResBlockGenerator

__all__ = [
    "PatchDiscriminator",
    "ProjectionDiscriminator",
    "ResBlockGenerator",
    "ResnetGenerator",
]
