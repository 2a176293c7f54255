"""What an event of torch's profiler is, in a training step whose parts are marked in it."""

import re
from typing import NamedTuple

from torch.autograd.profiler_util import FunctionEvent

G, D = "generators forward", "discriminators forward"
PARTS = ("data", G, D, "backward", "optimizers", "EMA", "logging", "rest")
SPECTRAL = "spectral norm"
ALONE = ("data", "optimizers", "EMA", "logging")  # parts that are one kind of operator too
LOSS, REST = "losses and image pools", "Python and rest"
ENGINE = "autograd::engine::evaluate_function"
KINDS = {  # by an operator's name, the first that fits; "2" has two directions
    "spectral norm": "spectral",
    "convolution2": "conv|inputgradient|weightgradient",
    "norm2": "norm",
    "padding": "pad",
    "upsampling and pooling": "upsample|pool",
    "linear": r"addmm|linear|matmul|embedding|bmm|::mm|^mm|::t$|^tback",
    "activations and elementwise": "relu|threshold|tanh|add|sub|mul|div|neg|pow|sqrt|sum|mean|cat|"
    "clone|copy|contiguous|_to|::to|view|reshape|flatten|alias|expand|squeeze|slice|select|split|"
    "chunk|index|repeat|zeros|ones|fill|empty|detach|rand|clamp|where|transpose|permute|stride",
}
OPERATORS = (
    "convolution forward", "convolution backward", "norm forward", "norm backward", "padding",
    "activations and elementwise", "upsampling and pooling", "linear", SPECTRAL,
    "gradients added up", LOSS, *ALONE, REST,
)  # fmt: skip


class Place(NamedTuple):
    """Where an event of the profiler's belongs.

    Attributes:
        part: the innermost one that it is in.
        of: in a backward pass the part that is differentiated, else the part.
        operator: the outermost in that part; empty outside of any.
    """

    part: str = ""
    of: str = ""
    operator: str = ""


class Places:
    """Finds them. A node of a backward pass has the number of the operator that made it."""

    def __init__(self, events: list[FunctionEvent]) -> None:
        self.found: dict[int, Place] = {}
        self.makers: dict[tuple[int, int], FunctionEvent] = {}
        for event in sorted(events, key=lambda e: e.time_range.start):
            if event.sequence_nr >= 0 and not event.fwd_thread:
                self.makers[event.thread, event.sequence_nr] = event

    def of(self, event: FunctionEvent | None) -> Place:
        if event is None:
            return Place()
        if event.id not in self.found:
            self.found[event.id] = self._place(event)
        return self.found[event.id]

    def _place(self, event: FunctionEvent) -> Place:
        outside = self.of(event.cpu_parent)
        if event.name in PARTS or event.name == SPECTRAL:
            return Place(event.name, event.name)
        if outside.operator:
            return outside
        if event.name.startswith(ENGINE):
            maker = self.makers.get((event.fwd_thread or event.thread, event.sequence_nr))
            return Place("backward", self.of(maker).of)
        return outside._replace(operator=event.name)


def kind(place: Place) -> str:
    """Which of OPERATORS; empty where the operator's name tells nothing."""
    if place.part in ALONE:
        return place.part
    if place.of == SPECTRAL:
        return SPECTRAL
    if not place.operator:
        return REST
    backward, name = place.part == "backward", place.operator.lower()
    if backward and re.match("torch::autograd::accumulategrad|aten::add", name):
        return "gradients added up"
    if place.of == "rest":
        return LOSS
    for found, pattern in KINDS.items():
        if re.search(pattern, name):
            return found.replace("2", " backward" if backward else " forward")
    return ""
