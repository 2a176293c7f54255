"""`python train.py`: from a command line, through Hydra, to a run."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gannorm import config, parallel
from gannorm.commands.composition import CONF, spelled_out
from gannorm.config import explain_composition
from gannorm.errors import RequestError, answering_requests
from gannorm.study.members import register
from gannorm.training.folder import replacing, writable
from gannorm.training.loop import train
from gannorm.training.memory import limit_memory
from gannorm.training.request import run_folder

# What this process has and a launcher's fresh one lacks. The launchers of joblib and submitit
# pickle the function below by value, and with it this.
_SENT: dict[str, Any] = {}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _main(cfg: DictConfig) -> None:
    for key, table in _SENT["tables"].items():  # a script's own entries
        for name, entry in table.items():
            config.TABLES[key].setdefault(name, entry)
    sys.argv = _SENT["argv"]  # which the run's folder tells
    chosen = HydraConfig.get()
    run_dir = Path(chosen.runtime.output_dir)
    if chosen.runtime.choices["hydra/launcher"] == "basic":
        if not torch.cuda.is_available():
            limit_memory()
        with answering_requests(), parallel.failing_together(), _nothing_left(run_dir, True):
            train(cfg, run_dir, lambda: _note(cfg, run_dir))
        return
    try:
        with _nothing_left(run_dir, False):  # other runs may begin beside it
            train(cfg, run_dir, lambda: _note(cfg, run_dir))
    except RequestError as error:  # said now; raised, it is the sweep's answer when the others end
        print(f"error: {error}", file=sys.stderr)
        raise


def _note(cfg: DictConfig, run_dir: Path) -> None:
    """Write what Hydra composed, once the run begins: a refused one changes no folder."""
    if not parallel.leads():
        return
    folder, hydra = run_dir / ".hydra", HydraConfig.instance().cfg
    assert hydra is not None
    parts = {"config": cfg, "hydra": hydra, "overrides": HydraConfig.get().overrides.task}
    with writable(run_dir):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in parts.items():
            with replacing(folder / f"{name}.yaml") as file:
                file.write(OmegaConf.to_yaml(content).encode())


@contextmanager
def _nothing_left(run_dir: Path, around: bool) -> Iterator[None]:
    """Remove the folder that Hydra made for a run that is refused; around: and those that it is in,
    below the current one, as far as they are empty."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: a run is in it
            run_dir.rmdir()
            for parent in run_dir.parents:
                if around and Path.cwd() in parent.parents:
                    parent.rmdir()
        raise


def main() -> None:
    """Train as the command line says. A script that adds to the tables first (`NORMS`, `DATA`,
    `FIGURES` ...) and then calls this is a train.py with these choices too; `--config-dir FOLDER`
    names the folder of their YAML files."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors of the composition come here
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    register()
    sys.argv[1:] = spelled_out(sys.argv[1:])
    _SENT.update(argv=sys.argv, tables=config.TABLES)
    with answering_requests(), parallel.joined_processes(), parallel.failing_together():
        if parallel.world() > 1 and {"-m", "--multirun"} & set(sys.argv):
            raise RequestError(
                "--multirun makes a run of each choice, and torchrun one of all its processes; "
                "call torchrun for each run"
            )
        try:
            _main()
        except (HydraException, OmegaConfBaseException) as error:
            raise RequestError(explain_composition(error, CONF)) from error
        except OSError as error:
            if any(frame.name == "_main" for frame in traceback.extract_tb(error.__traceback__)):
                raise
            said = f"cannot write to {error.filename}: {error.strerror}"  # Hydra makes the folder
            raise RequestError(f"{said}; choose another run folder with hydra.run.dir=") from error
        except ValueError as error:  # Hydra's own for `norm=null`; others are failures
            if "hydra" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            raise RequestError(str(error)) from error
