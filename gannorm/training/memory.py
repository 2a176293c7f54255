"""Too little memory, told in one line; and a limit, so that it can be told on a CPU too.

Linux gives memory to whoever asks and, when it has none left, kills the process that uses most: a
batch that is too large would end in exit code 137, without a word. Below a limit of the process's
own (RLIMIT_DATA: what it may write to and shares with nobody) the allocation fails instead.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from gannorm.errors import RunError
from gannorm.schema import Config

SHARE = 0.95  # of what is available; the rest is for page tables, and for others
GB = 2.0**30
# How torch, oneDNN and C++ say it, and CUDA and its libraries.
WORDS = (
    "can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc",
    "could not create a memory", "could not create a primitive", "out of memory", "ALLOC_FAILED",
)  # fmt: skip


def available() -> int | None:
    """Bytes that this process can have more of: of the machine, its swap included, and of its
    control group; None where nobody tells."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return min([found["MemAvailable"] + found["SwapFree"], *_of_groups()])
    return None


def _of_groups(
    own: Path = Path("/proc/self/cgroup"), place: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """What the control groups leave, of either version; those above this one's count too."""
    left = []
    for line in own.read_text("utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = place / kinds
        names = ("memory.max", "memory.current") if not kinds else (
            "memory.limit_in_bytes", "memory.usage_in_bytes")  # fmt: skip
        inside = Path(path.lstrip("/"))
        for folder in [root / inside, *(root / above for above in inside.parents), root]:
            with suppress(OSError, ValueError):  # "max" is no number
                most, used = (int((folder / name).read_text("ascii")) for name in names)
                stat = (folder / "memory.stat").read_text("ascii")
                found = dict(line.split() for line in stat.splitlines())
                for kind in ("inactive_file", "active_file"):  # pages that are given back
                    used -= int(found.get(f"total_{kind}", found.get(kind, 0)))  # v1, v2
                left.append(max(0, most - used))
    return left


def limit_memory() -> None:
    """Let an allocation fail that the machine has no memory for; Linux alone.

    Processes that torchrun starts on this machine have equal shares.
    """
    room = available()
    if room is None:
        return
    import resource  # no part of Python elsewhere

    status = Path("/proc/self/status").read_text("ascii")
    used = re.search(r"^VmData:\s+(\d+) kB", status, re.MULTILINE)
    shares = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if used is None:
        return
    soft = int(used[1]) * 1024 + int(SHARE * room / shares)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def telling_of_memory(
    cfg: Config, device: torch.device, evaluating: bool = False
) -> Iterator[None]:
    """Inside, an allocation that fails ends in one line.

    Raises:
        RunError: naming what was tried, training or `evaluating`, and what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        reason = _lack(error)
        if reason is None:
            raise
        raise RunError(_told(cfg, device, reason, evaluating)) from error


def _lack(error: BaseException) -> str | None:
    """In torch's words, of which allocation; None of another error."""
    if isinstance(error, RunError):  # told already
        return None
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return ". ".join(said.split(". ")[:3]).splitlines()[0]
    if isinstance(error, MemoryError) or any(word in said for word in WORDS):
        asked = re.search(r"tried to allocate (\d+) bytes", said)
        return f"{int(asked[1]) / GB:.1f} GiB more were not to be had" if asked else "none is left"
    return None


def _told(cfg: Config, device: torch.device, reason: str, evaluating: bool) -> str:
    data, (height, width) = cfg.data, cfg.data.size
    whole = "" if data.whole_batch == data.batch_size else f" (of all processes {data.whole_batch})"
    tried = f"data.batch_size={data.batch_size}{whole} images of {height}x{width}"
    if evaluating:
        tried = f"an evaluation (metrics.samples={cfg.metrics.samples or 'null'}) beside {tried}"
    widths = "model.g_widths, model.d_widths" if hasattr(cfg.model, "g_widths") else "model.width"
    changes = ["a smaller metrics.samples"] if evaluating else []
    changes += ["a smaller data.batch_size"] if data.batch_size > 1 else []
    changes += [f"smaller {widths}", "a smaller data.image_size"]
    if not (evaluating or cfg.trainer.checkpointing or cfg.trainer.compile):
        changes.append("trainer.checkpointing=true")
    if cfg.trainer.precision in ("fp32", "tf32"):
        changes.append("trainer.precision=bf16")
    if data.num_workers:
        changes.append("fewer data.num_workers")
    where = "this GPU" if device.type == "cuda" else "this machine"
    return (
        f"out of memory: {where} has too little for {tried} with model={cfg.model.name}: "
        f"{reason.rstrip('.')}; take {', or '.join(changes)}"
    )
