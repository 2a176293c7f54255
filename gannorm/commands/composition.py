"""The config files of the source tree, composed outside of a run."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gannorm.config import explain_composition
from gannorm.errors import RequestError
from gannorm.study import members

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(overrides: list[str]) -> DictConfig:
    """The config that `python train.py` makes of these overrides.

    Raises:
        RequestError: no config files here, or an override that Hydra refuses.
    """
    if not (CONF / "config.yaml").is_file():
        raise RequestError(f"there are no config files in {CONF}; run this in the source tree")
    members.register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", spelled_out(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise RequestError(explain_composition(error, CONF)) from error


def spelled_out(overrides: list[str]) -> list[str]:
    """`init_from=PATH` as `init_from.path=PATH`: Hydra knows a section or a value, not both.

    A path that is there is quoted, whatever characters it has.
    """
    out = []
    for each in overrides:
        key, _, value = each.partition("=")
        if key == "init_from" and not value.startswith("{"):
            if value and Path(value).expanduser().exists():
                value = "'" + value.replace("'", "\\'") + "'"
            each = f"init_from.path={value}"
        out.append(each)
    return out
