"""What a run is asked to be, before anything is written: its data, its device, its folder."""

from pathlib import Path

import torch

from gannorm.data import DATA
from gannorm.errors import RequestError
from gannorm.schema import Config
from gannorm.training import checkpoint


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
    return torch.device(name)


def find_resume(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to go on from: auto means the newest in the run folder, if there is one."""
    if resume is None:
        return None
    if resume == "auto":
        return checkpoint.newest(run_dir)
    return checkpoint.resolve(Path(resume))


def run_folder(family: str, now: str, resume: str | None) -> str:
    """Where a run goes: a new folder below `family`, or the folder of the run it continues.

    resume=auto continues the family's newest run, finished or not, resume=FOLDER that run; from a
    checkpoint file a new run starts, so that nothing behind that step is overwritten.
    """
    if resume == "auto":
        for folder in sorted(Path(family).glob("*"), reverse=True):
            if checkpoint.newest(folder):
                return str(folder)
    elif resume is not None and Path(resume).is_dir():
        return resume
    return f"{family}/{now}"
