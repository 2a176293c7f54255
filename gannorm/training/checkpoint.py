"""Checkpoints: one file holds everything a run needs to go on, written whole or not at all."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gannorm.errors import RequestError

FORMAT = 1
# What may differ between a run and its continuation; everything else decides what is trained.
FREE = (
    "resume", "init_from", "trainer", "metrics", "norm.backend", "data.root", "data.num_workers",
    "data.download", "data.cache", "data.cache_gb", "optim.lr_g", "optim.lr_d", "optim.schedule",
    "optim.decay_from", "optim.restart", "optim.clip_norm", "loss.r1", "loss.r2",
    "loss.gradient_penalty", "model.cycle_weight", "model.identity_weight",
)  # fmt: skip


WHOLE = "data.global_batch_size"


def rng_state() -> dict[str, Any]:
    """The state of every generator that training can draw on, as tensors and plain values."""
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "python": (version, keys, gauss),
        "numpy": (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # of the first process's GPU
        torch.cuda.set_rng_state(state["cuda"][0])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` never holds half of one, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        RequestError: no such file, or not a checkpoint of this program.
    """
    return checked(read(path), path)


def read(path: Path) -> Any:
    """What torch saved in a file: tensors and plain values only, no code (`weights_only=True`).

    Raises:
        RequestError: no such file, one that torch did not write, or one that needs code.
    """
    if not path.is_file():
        raise RequestError(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:
        raise RequestError(
            f"{path} is not a checkpoint of gannorm or a file of weights, or is damaged, or needs "
            "code of its own, which is not run"
        ) from error


def checked(content: Any, path: Path) -> dict[str, Any]:
    """The content of a file, refused where it is no checkpoint of this program's."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RequestError(f"{path} is not a gannorm checkpoint of format {FORMAT}")
    return content


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps, or None."""
    paths = sorted((run_dir / "checkpoints").glob("step_*.pt"))
    return paths[-1] if paths else None


def resolve(path: Path) -> Path:
    """A checkpoint file, given itself or its run folder.

    Raises:
        RequestError: neither is there.
    """
    if not path.is_dir():
        if not path.is_file():
            raise RequestError(f"there is no checkpoint or run folder {path}")
        return path
    file = newest(path)
    if file is None:
        raise RequestError(f"{path} holds no checkpoints/step_*.pt")
    return file


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a crash left half-written."""
    folder = run_dir / "checkpoints"
    for path in sorted(folder.glob("step_*.pt"))[:-keep]:
        path.unlink()
    for path in folder.glob("*.partial"):
        path.unlink()


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> list[str]:
    """Refuse to continue a run under a config that would train something else.

    Returns a line for each change that a continuation may make. A key that was not there when the
    run began has a value now that does what was done then.

    Raises:
        RequestError: naming every key that differs, with both values.
    """
    old, new = flat(saved), flat(now)
    differing, changes = [], []
    if old.get(WHOLE) is not None and old[WHOLE] == new.get(WHOLE):
        del old["data.batch_size"]  # other processes share the same batch
    for key in sorted(old):
        if old[key] == new.get(key):
            continue
        if any(_under(key, free) for free in FREE):
            changes.append(f"{key}: {old[key]} -> {new.get(key)}")
        else:
            differing.append(f"{key}={new.get(key)!r} (the run: {old[key]!r})")
    if differing:
        raise RequestError(
            f"cannot continue {path} with another configuration: {', '.join(differing)}; "
            "repeat the overrides of the run, or start a new one without resume= "
            "(init_from= gives it the weights)"
        )
    return [change for change in changes if not change.startswith("resume:")]


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a nested dictionary by its dotted key."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _under(key: str, parent: str) -> bool:
    return key == parent or key.startswith(parent + ".")
