"""What a run is asked to be, before anything is written: its data, its device, its folder."""

import os
from pathlib import Path
from typing import Any

import torch

from gannorm import parallel
from gannorm.data import DATA
from gannorm.errors import RequestError
from gannorm.schema import Config, DataConfig
from gannorm.training import checkpoint
from gannorm.training.folder import replacing, writable

LAUNCH = ".launch"  # in a run folder: which call of torchrun it is of


def check_pair(cfg: Config) -> None:
    """Refuse a model on data of the wrong kind, before any file is read."""
    if cfg.model.name not in DATA[cfg.data.name].tasks:
        fitting = [name for name, each in DATA.items() if cfg.model.name in each.tasks]
        raise RequestError(
            f"data={cfg.data.name} cannot train model={cfg.model.name}; "
            f"choose data= {', '.join(fitting)}"
        )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "trainer.device=cuda: no GPU was found; use trainer.device=auto or trainer.device=cpu"
        )
    if name == "cuda" and parallel.local_rank() >= torch.cuda.device_count():
        raise RequestError(
            f"trainer.device=cuda: more processes than this machine's {torch.cuda.device_count()} "
            "GPUs; start torchrun with as many as there are (--nproc-per-node=), or use "
            "trainer.device=cpu"
        )
    return torch.device(name)


def divided(data: DataConfig, saved: dict[str, Any] | None) -> DataConfig:
    """With the batch of all processes as `global_batch_size`, and a process's as `batch_size`.

    saved: the config of the run that is continued: by the same command, its whole batch stays what
        it was, whatever the number of processes.

    Raises:
        RequestError: the processes cannot share the batch equally.
    """
    processes, whole = parallel.world(), data.global_batch_size
    if whole is None:
        whole = data.batch_size * processes
        if saved is not None and saved["data"]["batch_size"] == data.batch_size:
            whole = saved["data"].get("global_batch_size") or data.batch_size
    if whole % processes:
        raise RequestError(
            f"data.global_batch_size={whole} cannot be shared by {processes} processes equally; "
            "choose a multiple, or another --nproc-per-node"
        )
    return data.model_copy(update={"batch_size": whole // processes, "global_batch_size": whole})


def find_resume(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to go on from: auto means the newest in the run folder, if there is one.

    In place of a damaged one the one before it is taken.
    """
    if resume is None:
        return None
    if resume == "auto":
        return checkpoint.newest_whole(run_dir)
    return checkpoint.resolve(Path(resume))


def run_folder(family: str, now: str, resume: str | None) -> str:
    """Where a run goes: a new folder below `family`, or the folder of the run it continues.

    resume=auto continues the family's newest run, finished or not, resume=FOLDER that run; from a
    checkpoint file a new run starts, so that nothing behind that step is overwritten. Processes
    that torchrun starts again go on in the folder of those before. All take the first one's.
    """
    if parallel.world() == 1:
        return _run_folder(family, now, resume)
    if family not in _agreed:
        _agreed[family] = parallel.from_first(lambda: _run_folder(family, now, resume))
    return _agreed[family]


_agreed: dict[str, str] = {}  # processes that train together have one run


def _run_folder(family: str, now: str, resume: str | None) -> str:
    for folder in sorted(Path(family).glob("*"), reverse=True):
        if is_restarted(folder):
            return str(folder)
    if resume == "auto":
        for folder in sorted(Path(family).glob("*"), reverse=True):
            if checkpoint.newest(folder):
                return str(folder)
    elif resume is not None and Path(resume).is_dir():
        return resume
    return f"{family}/{now}"


def is_restarted(run_dir: Path) -> bool:
    """Whether torchrun has started these processes again, after one of them died in `run_dir`."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return False
    path = run_dir / LAUNCH
    return path.is_file() and path.read_text(encoding="utf-8") == launch()


def launch() -> str:
    """A word for the call of torchrun that this process is of; nothing where there is none."""
    # The folder that this call has made for its processes' errors: names are given twice.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return str(Path(error_file).parents[2]) if error_file else ""


def mark(run_dir: Path) -> None:
    """Write down whose run this is, for processes that are started again."""
    if launch():
        with writable(run_dir), replacing(run_dir / LAUNCH) as file:
            file.write(launch().encode())
