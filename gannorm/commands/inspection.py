"""`python -m gannorm inspect`: the norm table of a checkpoint, or of what a config would train."""

import argparse
from pathlib import Path
from typing import Any

import torch

from gannorm.commands.composition import composed
from gannorm.commands.trained import load_task
from gannorm.config import typed
from gannorm.data import DATA, build_data
from gannorm.diagnostics.norm_layers import AVERAGED, gaps, render, table
from gannorm.errors import RequestError
from gannorm.tasks import TASKS, ClassConditional, Task, build_task
from gannorm.training import weights
from gannorm.training.request import check_pair

EXAMPLE = """examples:
  python -m gannorm inspect outputs/RUN
  python -m gannorm inspect model=resblock_gan norm=batch data.batch_size=4
"""


def add(commands: Any) -> None:
    three = commands.add_parser(
        "inspect", help="print every norm layer and what is wrong with it",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLE,
    )  # fmt: skip
    three.add_argument(
        "what", nargs="*", metavar="CHECKPOINT | KEY=VALUE ...",
        help="a checkpoint or another file of weights, or overrides of the config, as for train.py",
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
        averaged = {
            f"{AVERAGED}{name}": net
            for name, net in task.averaged.items()
            if net is not task.generators.get(name)  # as of a file that has one of them
        }
    else:
        task, averaged = _of_config(overrides), {}
    with gaps(averaged) as gap_of, torch.no_grad(), task.norm_backend():
        if averaged and isinstance(task, ClassConditional):
            noise = task.noise(task.cfg.data.batch_size)
            task.averaged["G"](noise, task.labels(len(noise)))
    rows = table({**task.networks, **averaged}, task.norm_inputs(), gap_of)
    cfg = task.cfg
    height, width = cfg.data.size
    print(
        f"{cfg.model.name}, norm {cfg.norm.name}, batch {cfg.data.batch_size} of {height}x{width}; "
        "values: per mean and variance"
    )
    print(render(rows) if rows else "no norm layers")


def _of_config(overrides: list[str]) -> Task:
    """An untrained task of the config files of the source tree."""
    cfg = typed(composed(overrides))
    check_pair(cfg)
    classes = DATA[cfg.data.name].num_classes  # without a download, where it is known
    if TASKS[cfg.model.name].task.takes_labels and classes is None:
        classes = build_data(cfg.data).num_classes
    task = build_task(cfg, torch.device("cpu"), classes)
    if cfg.init_from.path:
        weights.start(task, cfg.init_from)
    return task
