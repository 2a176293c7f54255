"""What networks see in images: features, logits, predicted classes."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gannorm import parallel


@dataclass
class Observations:
    """Some images as the networks see them; None for what there is not."""

    features: Tensor  # (N, D)
    logits: Tensor | None = None  # (N, K), of kinds of images
    predicted: Tensor | None = None  # (N,), by a classifier of the domain
    labels: Tensor | None = None  # (N,)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Tensor | slice) -> "Observations":
        return Observations(*(None if v is None else v[index] for v in self.values()))  # type: ignore[arg-type]

    def values(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device) -> "Observations":
        return Observations(*(None if v is None else v.to(device) for v in self.values()))  # type: ignore[arg-type]

    @classmethod
    def of_all(cls, parts: Iterable["Observations"], device: torch.device) -> "Observations":
        """All processes' parts, joined in their order."""
        if parallel.world() == 1:  # nothing has to leave the GPU
            return cls.joined(parts)
        sent = parallel.joined([part.to(parallel.CPU) for part in parts])
        return cls.joined(sent).to(device)

    @classmethod
    def joined(cls, parts: Iterable["Observations"]) -> "Observations":
        columns = zip(*(part.values() for part in parts), strict=True)
        return cls(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]
