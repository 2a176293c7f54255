"""Where NaN or infinity first appears in a step that is run again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _Found(Exception):
    pass


def first_nonfinite(
    networks: Mapping[str, nn.Module], step: Callable[[], Any]
) -> tuple[int, str] | None:
    """Where NaN or infinity first appears while `step()` runs: behind how many tensors without
    them, and in words; None if nowhere.

    Looks at every module's output on the way forward and at its gradient on the way back. The
    networks are of no use afterwards.
    """

    seen = 0

    def look(name: str, value: Tensor, backward: bool = False) -> None:
        nonlocal seen
        seen += 1
        if not value.isfinite().all():
            what = "the gradient that arrives at" if backward else "the output of"
            raise _Found(f"{what} {name}")

    with _hooked(networks, look):
        try:
            step()
        except _Found as place:
            return seen, str(place)
    return None


@contextmanager
def _hooked(networks: Mapping[str, nn.Module], look: Callable[..., None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def forward(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                look(name, output.detach())
                if output.requires_grad:
                    output.register_hook(lambda gradient: look(name, gradient, backward=True))

        return forward

    handles = [
        module.register_forward_hook(hook(f"{net} {name} ({type(module).__name__})"))
        for net, network in networks.items()
        for name, module in network.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
