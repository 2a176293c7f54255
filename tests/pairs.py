"""Few combinations of parameters in which every two values of two of them meet."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairs(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All-pairs combinations: the next is always one with most pairs that have not met yet."""
    values = [list(each) for each in parameters]
    every = list(product(*(range(len(each)) for each in values)))

    def met(places: tuple[int, ...]) -> set[tuple[Any, ...]]:
        return set(combinations(enumerate(places), 2))

    missing = set().union(*map(met, every))
    chosen = []
    while missing:
        best = max(every, key=lambda places: len(met(places) & missing))
        missing -= met(best)
        chosen.append(best)
    return [tuple(each[i] for each, i in zip(values, c, strict=True)) for c in sorted(chosen)]
