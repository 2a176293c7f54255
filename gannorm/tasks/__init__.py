"""What is trained and evaluated: the tasks that a config's `model` can name.

A task of one's own is an entry more: `TASKS["mine"] = TaskKind(config, task, evaluator)`, and a
file `conf/model/mine.yaml` with the values of its config.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gannorm.schema import Config, CycleGANConfig, ModelConfig, ResBlockGANConfig
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.tasks.class_conditional_evaluator import ClassConditionalEvaluator
from gannorm.tasks.cyclegan import CycleGAN
from gannorm.tasks.cyclegan_evaluator import CycleGANEvaluator
from gannorm.tasks.evaluator import Evaluator
from gannorm.tasks.task import Task

__all__ = ["TASKS", "ClassConditional", "CycleGAN", "Evaluator", "Task", "TaskKind", "build_task"]


@dataclass(frozen=True)
class TaskKind:
    """config: the class of its section; evaluator: (task, data) to what evaluates it."""

    config: type[ModelConfig]
    task: type[Task]
    evaluator: type[Evaluator[Any]]


TASKS: dict[str, TaskKind] = {
    "cyclegan": TaskKind(CycleGANConfig, CycleGAN, CycleGANEvaluator),
    "resblock_gan": TaskKind(ResBlockGANConfig, ClassConditional, ClassConditionalEvaluator),
}


def build_task(cfg: Config, device: torch.device, num_classes: int | None) -> Task:
    """The task of a config's `model` section.

    Raises:
        RequestError: a norm, a size or a data set that cannot work with the model.
    """
    return TASKS[cfg.model.name].task(cfg, device, num_classes)
