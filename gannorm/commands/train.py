"""`python train.py`: from a command line, through Hydra, to a run."""

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gannorm.commands.composition import CONF, spelled_out
from gannorm.config import explain_composition
from gannorm.errors import RequestError, answering_requests
from gannorm.study.members import register
from gannorm.training.loop import train
from gannorm.training.request import run_folder


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _main(cfg: DictConfig) -> None:
    with answering_requests():
        train(cfg, Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Train as the command line says. A script that adds to the tables first (`NORMS`, `DATA`,
    `FIGURES` ...) and then calls this is a train.py with these choices too; `--config-dir FOLDER`
    names the folder of their YAML files."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors of the composition come here
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    register()
    sys.argv[1:] = spelled_out(sys.argv[1:])
    with answering_requests():
        try:
            _main()
        except (HydraException, OmegaConfBaseException) as error:
            raise RequestError(explain_composition(error, CONF)) from error
        except ValueError as error:  # Hydra's own for `norm=null`; others are failures
            if "hydra" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            raise RequestError(str(error)) from error
