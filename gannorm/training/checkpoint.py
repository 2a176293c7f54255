"""Checkpoints: one file holds everything a run needs to go on, written whole or not at all.

A digest goes with it (`seal.py`), so that a damaged one is found before torch reads it.
"""

import random
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gannorm.errors import RequestError
from gannorm.training import seal
from gannorm.training.folder import replacing
from gannorm.training.report import tell

FORMAT = 2  # 1: without a seal
# Of FREE sections: with other parts a step takes other batches.
FIXED = ("trainer.grad_accum",)
# What may differ between a run and its continuation; everything else decides what is trained.
FREE = (
    "resume", "init_from", "trainer", "metrics", "norm.backend", "data.root", "data.num_workers",
    "data.worker_timeout", "data.download", "data.cache", "data.cache_gb", "optim.lr_g",
    "optim.lr_d", "optim.schedule", "optim.decay_from", "optim.restart", "optim.clip_norm",
    "loss.r1", "loss.r2", "loss.gradient_penalty", "model.cycle_weight", "model.identity_weight",
)  # fmt: skip


BEFORE = {"trainer.grad_accum": 1}  # what runs did that have no such key
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


class DamagedError(RequestError):
    """Of a file that is not what was written once."""


class _Sink:
    """What torch.save writes to; its own words for a full disk do not say so."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` never holds half of one, even after a power cut.

    Raises:
        OSError: its folder is not there, or it cannot be written; nothing of it is left, and what
            was there before is.
    """
    with replacing(path) as file:
        sink: Any = _Sink(file)
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(True)  # which the seal rests on
        try:
            torch.save({"format": FORMAT, **content}, sink)
        except Exception:
            if sink.error is not None:
                raise sink.error from None
            raise
        finally:
            torch.serialization.set_crc32_options(before)
        seal.seal(file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        RequestError: no such file, not a checkpoint of this program, a damaged one, or a newer
            program's.
    """
    return checked(read(path), path)


def read(path: Path) -> Any:
    """What torch saved in a file: tensors and plain values only, no code (`weights_only=True`).

    Nothing is read before every byte of an archive was checked.

    Raises:
        RequestError: no such file, one that cannot be read, that torch did not write, a damaged
            one, or one that needs code.
    """
    if not path.is_file():
        raise RequestError(f"there is no checkpoint {path}")
    with _opened(path) as file:
        sealed = _check(file, path)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except OSError as error:
            raise _unreadable(path, error) from error
        except Exception as error:
            raise DamagedError(
                f"{path} is not a checkpoint of gannorm or a file of weights, or is damaged, or "
                "needs code of its own, which is not run"
            ) from error
    if isinstance(content, dict) and content.get("format") == FORMAT and not sealed:
        raise DamagedError(f"{path} is damaged: its digest is gone")
    return content


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:  # deleted since it was listed
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _check(file: BinaryIO, path: Path) -> bool:
    try:
        return seal.check(file)
    except seal.DamagedError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    except OSError as error:  # of the disk: the file may be whole
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> RequestError:
    return RequestError(f"cannot read {path}: {error.strerror or error}")


def checked(content: Any, path: Path) -> dict[str, Any]:
    """The content of a file, refused where it is no checkpoint of this program's."""
    written = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(written, int):
        raise DamagedError(f"{path} is not a gannorm checkpoint")
    if written > FORMAT:
        raise RequestError(
            f"{path} was written by a newer gannorm (format {written}; this one reads up to "
            f"{FORMAT}); update gannorm"
        )
    return content


def of_a_run(path: Path) -> dict[str, Any]:
    """`load`, of a file that a run can go on from.

    Raises:
        RequestError: as `load`, or it has no networks.
    """
    return complete(load(path), path)


def complete(content: dict[str, Any], path: Path) -> dict[str, Any]:
    task = content.get("task")
    has = isinstance(task, dict) and {"networks", "averaged"} <= task.keys()
    if not has or not isinstance(content.get("config"), dict):
        raise DamagedError(f"{path} is not a gannorm checkpoint: it has no networks or no config")
    return content


def all_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, those with fewer steps first."""
    return sorted((run_dir / "checkpoints").glob("step_*.pt"))


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps, whole or not, or None."""
    return next(reversed(all_of(run_dir)), None)


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run folder that is not damaged, or None where there are none.

    Damaged ones are named on stderr.

    Raises:
        RequestError: all are damaged: naming them; or the newest cannot be read.
    """
    faults: dict[Path, str] = {}
    for path in reversed(all_of(run_dir)):
        fault = fault_of(path)
        if fault is not None:
            faults[path] = fault
            continue
        for fault in faults.values():
            tell(f"{fault}; taking the one before it, {path.name}")
        return path
    if faults:
        raise DamagedError(f"no checkpoint of {run_dir} is whole: {'; '.join(faults.values())}")
    return None


def newer(run_dir: Path, path: Path) -> list[Path]:
    """The checkpoints of a run folder behind `path`, the newest first; all, if it is elsewhere."""
    files = all_of(run_dir)[::-1]
    here = [file.resolve() for file in files]
    return files[: here.index(path.resolve())] if path.resolve() in here else files


def set_aside(run_dir: Path, path: Path) -> None:
    """Rename the damaged checkpoints behind `path` to *.damaged: a run that goes on from that one
    comes to their steps."""
    for bad in newer(run_dir, path):
        bad.replace(bad.with_suffix(".damaged"))
        tell(f"{bad} is called {bad.stem}.damaged now")


def fault_of(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, which names it, or None.

    Raises:
        RequestError: it cannot be read.
    """
    with _opened(path) as file:
        try:
            _check(file, path)
        except DamagedError as error:
            return str(error)
        file.seek(0)
        archive = file.read(4) == b"PK\x03\x04"
    return None if archive else f"{path} is damaged: it is no zip archive"


def is_whole(path: Path) -> bool:
    """Whether there is such a checkpoint; a damaged one is named on stderr."""
    try:
        fault = fault_of(path)
    except FileNotFoundError:
        return False
    if fault is not None:
        tell(fault)
    return fault is None


def resolve(path: Path) -> Path:
    """A checkpoint file, given itself or its run folder: then the newest that is not damaged.

    Raises:
        RequestError: neither is there, or all are damaged.
    """
    if not path.is_dir():
        if not path.is_file():
            raise RequestError(f"there is no checkpoint or run folder {path}")
        return path
    file = newest_whole(path)
    if file is None:
        raise RequestError(f"{path} holds no checkpoints/step_*.pt")
    return file


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a crash left half-written."""
    for path in all_of(run_dir)[:-keep]:
        path.unlink()
    for path in (run_dir / "checkpoints").glob("*.partial"):
        path.unlink()


def check_same(saved: dict[str, Any], now: dict[str, Any], path: Path) -> list[str]:
    """Refuse to continue a run under a config that would train something else.

    Returns a line for each change that a continuation may make. A key that was not there when the
    run began has a value now that does what was done then.

    Raises:
        RequestError: naming every key that differs, with both values.
    """
    old, new = {**BEFORE, **flat(saved)}, {**BEFORE, **flat(now)}
    differing, changes = [], []
    if old.get(WHOLE) is not None and old[WHOLE] == new.get(WHOLE):
        del old["data.batch_size"]  # other processes share the same batch
    for key in sorted(old):
        if old[key] == new.get(key):
            continue
        if key not in FIXED and any(_under(key, free) for free in FREE):
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
