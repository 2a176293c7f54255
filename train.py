"""Train a GAN:  python train.py [model=...] [norm=...] [data=...] [experiment=...] [key=value ...]

python train.py norm=instance                                # CycleGAN on embedded digits
python train.py model=resblock_gan norm=conditional_batch    # class-conditional GAN
python train.py --help                                       # every choice and key
"""

import os
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gannorm.config import explain_composition
from gannorm.errors import RequestError, answering_requests
from gannorm.study.members import register
from gannorm.training.loop import run_folder, train

CONF = Path(__file__).parent / "conf"

OmegaConf.register_new_resolver("run_folder", run_folder)
register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    with answering_requests():
        train(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors of the composition come here
    with answering_requests():
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise RequestError(explain_composition(error, CONF)) from error
        except ValueError as error:  # Hydra's own for `norm=null`; others are failures
            if "hydra" not in traceback.extract_tb(error.__traceback__)[-1].filename:
                raise
            raise RequestError(str(error)) from error
