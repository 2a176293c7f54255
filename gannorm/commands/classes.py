"""Images of a class-conditional model, by the names of its classes and the seeds of its noises."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from gannorm.config import nearest
from gannorm.errors import RequestError
from gannorm.tasks import ClassConditional
from gannorm.tasks.class_conditional_evaluator import mixed, slerp

CHUNK = 64  # noises drawn at a time
MOST_SEEDS = 100_000
LISTED = 20  # classes that a refusal names
LONGEST = 120  # bytes of a class's name in the name of a file
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]|\.{2,}')


def pick_classes(names: Sequence[str], asked: Sequence[str | int]) -> list[int]:
    """The numbers of the classes asked for: each a name, a number, or several with commas.

    A name is looked for first: the class named 3 is that of `3`, whatever its number.

    Raises:
        RequestError: no such class, with the nearest one's name.
    """
    picked: list[int] = []
    for each in map(str, asked):
        parts = [each] if each in names else each.split(",")
        picked += [_pick(names, part.strip()) for part in parts]
    return list(dict.fromkeys(picked))


def _pick(names: Sequence[str], word: str) -> int:
    if word in names:
        return names.index(word)
    if re.fullmatch(r"[0-9]+", word) and int(word) < len(names):
        return int(word)
    last = len(names) - 1
    if list(names) == [str(k) for k in range(len(names))]:
        raise RequestError(f"--class {word}: the model has classes 0 to {last}")
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    raise RequestError(
        f"--class {word}: the model has classes {', '.join(names[:LISTED])}{more}, "
        f"by number 0 to {last}{nearest(word, list(names))}"
    )


def pick_seeds(text: str) -> list[int]:
    """0-99, 0,3,7 or 0-3,8 as a list, each once, in this order.

    Raises:
        RequestError: something else, or too many.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, re.ASCII)
        if not found:
            raise RequestError(f"--seeds {text}: {part!r} is no seed; write 0-99 or 0,3,7")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise RequestError(f"--seeds {text}: {part} counts down; write {last}-{first}")
        if last - first + len(seeds) >= MOST_SEEDS:
            raise RequestError(
                f"--seeds {text}: more than {MOST_SEEDS} seeds; take fewer at a time"
            )
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def stems(task: ClassConditional) -> list[str]:
    """How the file names of each class's images begin."""
    if task.num_classes is None:
        return ["image"]
    return [f"class{name}" for name in file_names(task.class_names)]


def file_names(names: Sequence[str]) -> list[str]:
    """The names as parts of file names: safe in any folder, all different, whatever the case."""
    safe: list[str] = []
    for k, name in enumerate(names):
        word = UNSAFE.sub("_", name).encode()[:LONGEST].decode(errors="ignore")
        taken = {each.casefold() for each in safe}
        while word.casefold() in taken:
            word = f"{word}_{k}"
        safe.append(word)
    return safe


def draw_noise(
    task: ClassConditional, generator: torch.Generator, truncation: float | None
) -> Tensor:
    """The next CHUNK noises (CHUNK, Z), on the CPU; within +-truncation alone where it is given."""
    noise = torch.randn(CHUNK, task.model.z_dim, generator=generator)
    if truncation is not None:
        torch.nn.init.trunc_normal_(noise, a=-truncation, b=truncation, generator=generator)
    return noise


def noise_of(task: ClassConditional, seed: int, truncation: float | None = None) -> Tensor:
    """The noise (1, Z) of a seed: the first that `sample --seed` draws."""
    return draw_noise(task, torch.Generator().manual_seed(seed), truncation)[:1]


@torch.no_grad()
def image_of(
    task: ClassConditional, label: int, seed: int, truncation: float | None = None
) -> Tensor:
    """The averaged generator's image (C, H, W) of a class and a seed.

    Made alone: in a batch with others its last bits would depend on how many they are.
    """
    noise = noise_of(task, seed, truncation).to(task.device)
    with task.norm_backend():
        return task.averaged["G"](noise, torch.tensor([label], device=task.device))[0].cpu()


@torch.no_grad()
def between_seeds(
    task: ClassConditional, label: int, seeds: tuple[int, int], count: int,
    truncation: float | None = None,
) -> Tensor:  # fmt: skip
    """`count` images (N, C, H, W) of a class, from one seed's to another's, both included."""
    first, last = (noise_of(task, seed, truncation)[0] for seed in seeds)
    noise = slerp(first, last, torch.linspace(0, 1, count)).to(task.device)
    labels = torch.full((1,), label, device=task.device)
    with task.norm_backend():
        return torch.cat([task.averaged["G"](z[None], labels).cpu() for z in noise])


@torch.no_grad()
def between_classes(
    task: ClassConditional, labels: tuple[int, int], seeds: Sequence[int], shares: Sequence[float],
    truncation: float | None = None,
) -> Tensor:  # fmt: skip
    """Images (seeds x shares, C, H, W) of mixtures of two classes: 0 is the first, 1 the second.

    For each seed in turn, all shares.
    """
    one_hot = torch.eye(len(task.class_names), device=task.device)
    share = torch.tensor(shares, dtype=torch.float32, device=task.device)[:, None]
    net = mixed(task.averaged["G"], torch.lerp(one_hot[labels[0]], one_hot[labels[1]], share))
    rows = torch.arange(len(shares), device=task.device)[:, None]
    noises = [noise_of(task, seed, truncation).to(task.device) for seed in seeds]
    with task.norm_backend():
        return torch.cat([net(z, row).cpu() for z in noises for row in rows])
