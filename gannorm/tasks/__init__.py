"""What is trained: networks, losses, one step, samples and figures."""

import torch

from gannorm.config import Config, CycleGANConfig
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.tasks.cyclegan import CycleGAN
from gannorm.tasks.task import Task

__all__ = ["ClassConditional", "CycleGAN", "Task", "build_task"]


def build_task(cfg: Config, device: torch.device, num_classes: int | None) -> Task:
    """The task of a config's `model` section.

    Raises:
        RequestError: a norm, a size or a data set that cannot work with the model.
    """
    kind = CycleGAN if isinstance(cfg.model, CycleGANConfig) else ClassConditional
    return kind(cfg, device, num_classes)
