"""What evaluates: figures of the generators, their samples, what is wrong with them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gannorm import parallel
from gannorm.data import Data
from gannorm.diagnostics.faults import Probe, measure, norm_faults, sample_faults
from gannorm.diagnostics.norm_layers import gaps
from gannorm.metrics.evaluation import Evaluation, build_references
from gannorm.metrics.standing import renew_statistics
from gannorm.tasks.task import Networks, Task

AnyTask = TypeVar("AnyTask", bound=Task)


class Evaluator(ABC, Generic[AnyTask]):
    """The evaluation of one kind of task.

    Attributes:
        measures: what it can give a figure that needs it (`gannorm.metrics.figures`).
        references: the real images of each domain, for the figures.
    """

    measures: tuple[str, ...]

    def __init__(self, task: AnyTask, data: Data) -> None:
        self.task, self.data, self.cfg, self.device = task, data, task.cfg, task.device
        self.references = build_references(task.cfg.metrics, data, task.device)

    def share_state(self) -> None:
        """All processes look with the first one's networks: those trained elsewhere may differ in
        the last digits."""
        for reference in self.references:
            for net in (reference.extractor, reference.reader):
                if net is not None:
                    parallel.broadcast_([*net.parameters(), *net.buffers()])

    @abstractmethod
    def measure(self, generators: Networks, brief: bool) -> Evaluation:
        """Sample quality of generators in evaluation mode; a single class's as NAME/CLASS.

        brief: without the figures that cost passes of their own.
        """

    @abstractmethod
    def standing_forwards(self, name: str, net: Any, count: int) -> list[Callable[[], Any]]:
        """`count` forward passes of generator `name`, each on another batch of training size."""

    @abstractmethod
    def reference_figures(self) -> dict[str, float]:
        """What the figures are to be held against, as FIGURE_real etc.; computed once."""

    @abstractmethod
    def probes(self) -> dict[str, Probe]:
        """Images of the averaged generators for the diagnostics, by name ("" or "_AtoB")."""

    @abstractmethod
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """Named image batches (N, C, H, W) to show, and how many stand in a row."""

    @abstractmethod
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """More of them, shown at evaluations: interpolations, the nearest training images."""

    @property
    def named(self) -> bool:
        """Whether the classes have names that say more than their numbers."""
        names = self.task.class_names
        return bool(self.task.num_classes) and names != [str(k) for k in range(len(names))]

    def captions(self, name: str) -> tuple[Sequence[str], Sequence[str]]:
        """What to write beside the rows and above the columns of a picture, by its name."""
        return (), ()

    @torch.no_grad()
    def diagnose(self) -> tuple[dict[str, float], dict[str, str]]:
        """Figures of the samples and the norms, and the faults in them by name."""
        with gaps(self.task.averaged) as gap:
            figures = measure(self.probes())
        faults = sample_faults(figures)
        faults |= norm_faults({**self.task.averaged, **self.task.discriminators}, gap)
        if gap:
            figures["probe/norm_gap"] = max(gap.values())
        return figures, faults

    @torch.no_grad()
    def evaluate(self, generators: Networks, brief: bool = False) -> Evaluation:
        """Copies of `generators`, trained or averaged, measured; they themselves stay as they
        are."""
        copies = {name: copy.deepcopy(net).eval() for name, net in generators.items()}
        count = self.cfg.metrics.standing_batches
        for name, net in copies.items():
            renew_statistics(net, self.standing_forwards(name, net, count))
        return self.measure(copies, brief)

    def protocol(self) -> dict[str, Any]:
        """How the figures came about: written beside them."""
        each = [reference.protocol() for reference in self.references]
        made = each[0] if len(each) == 1 else dict(zip("AB", each, strict=True))
        return {
            "data": self.cfg.data.name,
            "image_size": self.cfg.data.image_size,
            "seed": self.cfg.seed,
            "standing_batches": self.cfg.metrics.standing_batches,
            **made,
        }
