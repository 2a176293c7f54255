"""What the commands share: a trained model from its file, pictures into a folder."""

import os
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from gannorm.commands.composition import composed
from gannorm.config import typed
from gannorm.data.images import to_image
from gannorm.errors import RequestError
from gannorm.tasks import Task, build_task
from gannorm.training import weights
from gannorm.training.request import pick_device


def load_task(path: Path, model: str | None = None, device: str = "auto") -> Task:
    """The task of a file or folder that `weights.read` takes; auto: on the GPU if there is one.

    It has the networks that are there, and no others.

    Raises:
        RequestError: no networks there, or those of another model than `model`.
    """
    return task_of(weights.read(path), model, device)


def task_of(found: weights.Weights, model: str | None = None, device: str = "auto") -> Task:
    """The task of weights that were read."""
    raw = found.config
    cfg = typed(composed(found.overrides()) if raw is None else OmegaConf.create(raw))
    if model is not None and cfg.model.name != model:
        raise RequestError(
            f"{found.path} holds a {cfg.model.name}, this command needs a {model}; "
            "sample is for class-conditional models, translate for image translation"
        )
    cfg.norm.backend = "auto"  # how the run computed, not what it learned
    task = build_task(cfg, pick_device(device), found.about.get("num_classes"))
    weights.install(task, found)
    task.class_names = found.about.get("class_names") or task.class_names
    return task


def pick_generator(task: Task, name: str, path: Path) -> nn.Module:
    """The averaged generator of this name.

    Raises:
        RequestError: the file has none.
    """
    if name not in task.averaged:
        raise RequestError(f"{path} holds {', '.join(task.networks)} and no {name}")
    return task.averaged[name]


def write_image(image: Tensor | Image.Image, path: Path) -> None:
    """A PNG that is never there by half."""
    partial = path.with_suffix(".partial")
    (to_image(image) if isinstance(image, Tensor) else image).save(partial, format="PNG")
    os.replace(partial, path)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to the folder {path}: {error.strerror}") from error
