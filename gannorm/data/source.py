"""What training data is made of."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gannorm.errors import RequestError

Batch = dict[str, Tensor]


class Source(Protocol):
    """Samples by index. `fetch` may draw on the generator alone for its randomness."""

    def __len__(self) -> int: ...

    def fetch(self, index: list[int], generator: torch.Generator) -> Batch: ...

    def digest(self) -> str:
        """A word for the content: of all that `fetch` depends on but its arguments."""
        ...


@runtime_checkable
class NamedSource(Source, Protocol):
    """A source whose images people know by name."""

    def name(self, i: int) -> str: ...


@runtime_checkable
class PartialSource(Source, Protocol):
    """A source whose samples are dear."""

    def fetch_part(self, index: list[int], generator: torch.Generator, own: slice) -> Batch:
        """The samples `own` of those that `fetch` returns; no other is made."""
        ...


def name(source: Source, i: int) -> str:
    """Of image i, in words."""
    return source.name(i) if isinstance(source, NamedSource) else f"number {i}"


def finite(batch: Batch, source: Source, index: list[int]) -> Batch:
    """The batch of these images.

    Raises:
        RequestError: naming the first that holds NaN or infinity.
    """
    images = batch.get("image")
    if images is not None and not images.sum().isfinite():  # cheaper than to look at each
        good = images.isfinite().flatten(1).all(1).tolist()
        if False in good:
            wrong = [name(source, i) for i, fine in zip(index, good, strict=True) if not fine]
            more = f" (and {len(wrong) - 1} more of these {len(good)})" if len(wrong) > 1 else ""
            raise RequestError(
                f"image {wrong[0]}{more} of {len(source)} in {type(source).__name__} holds NaN or "
                "infinity; mend or remove it"
            )
    return batch


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
