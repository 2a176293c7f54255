"""`python -m gannorm inspect`: the norm table of a checkpoint, or of what a config would train."""

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gannorm.commands.trained import load_task
from gannorm.config import explain_composition, typed
from gannorm.data import DATA, build_data
from gannorm.diagnostics.norm_layers import AVERAGED, gaps, render, table
from gannorm.errors import RequestError
from gannorm.study import members
from gannorm.tasks import TASKS, ClassConditional, Task, build_task
from gannorm.training.request import check_pair

CONF = Path(__file__).resolve().parents[2] / "conf"


def add(commands: Any) -> None:
    three = commands.add_parser("inspect", help="print every norm layer and what is wrong with it")
    three.add_argument(
        "what", nargs="*", metavar="CHECKPOINT | KEY=VALUE ...",
        help="a checkpoint, or overrides of the config, as for train.py",
    )  # fmt: skip
    three.set_defaults(run=lambda a: inspect(a.what))


def inspect(what: list[str]) -> None:
    """Print a line for every norm layer: what it averages over, its ranges, its verdict.

    what: one checkpoint file or run folder, or overrides of the config (key=value), none of
        which is the default config. Running statistics are compared with those of a batch of
        samples where a checkpoint can make one without images.

    Raises:
        RequestError: no such checkpoint, or a config that `train.py` would refuse too.
    """
    overrides = [each for each in what if "=" in each and not Path(each).exists()]
    if overrides and len(overrides) < len(what) or len(what) - len(overrides) > 1:
        raise RequestError(
            f"inspect takes one checkpoint or run folder, or key=value overrides, not {what}"
        )
    if what and not overrides:
        task = load_task(Path(what[0]))
        averaged = {f"{AVERAGED}{name}": net for name, net in task.averaged.items()}
    else:
        task, averaged = _of_config(overrides), {}
    with gaps(averaged) as gap_of, torch.no_grad(), task.norm_backend():
        if averaged and isinstance(task, ClassConditional):
            labels = torch.arange(task.cfg.data.batch_size, device=task.device)
            noise = torch.randn(len(labels), task.model.z_dim, device=task.device)
            task.averaged["G"](noise, labels % (task.num_classes or 1))
    rows = table({**task.networks, **averaged}, task.norm_inputs(), gap_of)
    cfg = task.cfg
    size = cfg.data.image_size
    print(
        f"{cfg.model.name}, norm {cfg.norm.name}, batch {cfg.data.batch_size} of {size}x{size}; "
        "values: per mean and variance"
    )
    print(render(rows) if rows else "no norm layers")


def _of_config(overrides: list[str]) -> Task:
    """An untrained task of the config files of the source tree."""
    if not (CONF / "config.yaml").is_file():
        raise RequestError(f"there are no config files in {CONF}; run this in the source tree")
    cfg = typed(_composed(overrides))
    check_pair(cfg)
    classes = DATA[cfg.data.name].num_classes  # without a download, where it is known
    if TASKS[cfg.model.name].task.needs_labels and classes is None:
        classes = build_data(cfg.data).num_classes
    return build_task(cfg, torch.device("cpu"), classes)


def _composed(overrides: list[str]) -> DictConfig:
    members.register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise RequestError(explain_composition(error, CONF)) from error
