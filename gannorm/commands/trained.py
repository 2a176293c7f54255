"""What the commands share: a trained model from its file, pictures into a folder."""

import os
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from gannorm.config import typed
from gannorm.data.images import to_image
from gannorm.errors import RequestError
from gannorm.tasks import Task, build_task
from gannorm.training import checkpoint
from gannorm.training.request import pick_device


def load_task(path: Path, model: str | None = None) -> Task:
    """The task of a checkpoint file or run folder, on the GPU if there is one.

    Raises:
        RequestError: no checkpoint there, or one of another model than `model`.
    """
    file = checkpoint.resolve(path)
    state = checkpoint.load(file)
    cfg = typed(OmegaConf.create(state["config"]))
    if model is not None and cfg.model.name != model:
        raise RequestError(
            f"{file} holds a {cfg.model.name}, this command needs a {model}; "
            "sample is for class-conditional models, translate for image translation"
        )
    cfg.norm.backend = "auto"  # how the run computed, not what it learned
    task = build_task(cfg, pick_device("auto"), state["num_classes"])
    task.load_state_dict(state["task"])
    return task


def write_image(image: Tensor, path: Path) -> None:
    """A PNG that is never there by half."""
    partial = path.with_suffix(".partial")
    to_image(image).save(partial, format="PNG")
    os.replace(partial, path)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to the folder {path}: {error.strerror}") from error
