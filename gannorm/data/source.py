"""What training data is made of."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Source(Protocol):
    """Samples by index. `fetch` may draw on the generator alone for its randomness."""

    def __len__(self) -> int: ...

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch: ...

    def digest(self) -> str:
        """A word for the content: of all that `fetch` depends on but its arguments."""
        ...


@runtime_checkable
class PartialSource(Source, Protocol):
    """A source whose samples are dear."""

    def fetch_part(self, index: list[int], generator: torch.Generator, own: slice) -> Batch:
        """The samples `own` of those that `fetch` returns; no other is made."""
        ...


@dataclass
class Data:
    """A data set: images float32 (N, C, H, W) in [-1, 1].

    domains: the training sources; one with keys "image" and, where there are labels, "label"
        (ResBlock GANs), or two with key "image" (translation: A, then B).
    test: the held-out part, the same keys, never augmented; for `digits_m` both domains carry
        labels, and B[i] is the true translation of A[i]. Where nothing is held out, `real`'s.
    real: the training images without augmentation, which samples are measured against.
    skipped: files that could not be used, each with the reason.
    class_names: in the order of the labels; where there are none, people see the numbers.
    """

    domains: list[Source]
    test: list[Source]
    real: list[Source]
    num_classes: int | None = None
    skipped: list[str] = field(default_factory=list)
    counterparts: bool = False  # test B[i] is the true translation of test A[i]
    class_names: list[str] | None = None
