"""A checkpoint put to use: samples of a class, translations of a folder of images."""

import os
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from gannorm.config import typed
from gannorm.data.images import list_images, open_image, to_image, to_tensor
from gannorm.errors import RequestError
from gannorm.tasks import ClassConditional, CycleGAN, Task, build_task
from gannorm.training import checkpoint
from gannorm.training.request import pick_device

CHUNK = 64  # samples generated at a time


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


@torch.no_grad()
def sample(
    path: Path,
    label: int | None,
    count: int,
    seed: int,
    out: Path,
    truncation: float | None = None,
) -> None:
    """Write `count` PNG files `class{label}_seed{seed}_{number}.png` of class `label` into `out`.

    Without a label the classes take turns. The averaged generator is used. The same seed gives
    the same images, whatever `count` is.

    truncation: noise from the part of the normal distribution within +-truncation: the smaller,
        the more typical and the less varied the images (Brock et al., 2019).

    Raises:
        RequestError: a class that the model does not have, a count below 1, or a truncation that
            is not positive.
    """
    task = load_task(path, "resblock_gan")
    assert isinstance(task, ClassConditional)
    classes = task.num_classes or 0
    if label is not None and not 0 <= label < classes:
        raise RequestError(f"--class {label}: the model has classes 0 to {classes - 1}")
    if count < 1:
        raise RequestError(f"--count {count} must be at least 1")
    if truncation is not None and not 0 < truncation < float("inf"):
        raise RequestError(f"--truncation {truncation} must be positive, 0.5 for example")
    if not -(2**63) <= seed < 2**64:
        raise RequestError(f"--seed {seed} must fit into 64 bits")
    _make_folder(out)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=count, unit="image") as bar, task.norm_backend():
        for start in range(0, count, CHUNK):
            numbers = torch.arange(start, start + CHUNK)
            labels = numbers % classes if label is None else torch.full((CHUNK,), label)
            noise = torch.randn(CHUNK, task.model.z_dim, generator=generator)
            if truncation is not None:
                torch.nn.init.trunc_normal_(noise, a=-truncation, b=truncation, generator=generator)
            images = task.averaged["G"](noise.to(task.device), labels.to(task.device))
            for number, image, k in zip(numbers.tolist(), images, labels.tolist(), strict=True):
                if number < count:
                    _write(image, out / f"class{k}_seed{seed}_{number:05d}.png")
                    bar.update()
    print(f"{count} images in {out}")


@torch.no_grad()
def translate(path: Path, source: Path, target: Path, direction: str) -> None:
    """Translate every image below `source` into `target`, under the same name, as PNG.

    Any size, any of the formats in `gannorm.data.images`; the averaged generator is used.

    Raises:
        RequestError: no images there, two that would get the same name, or unreadable ones (after
            all others were translated).
    """
    paths = list_images(source)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise RequestError(
            f"{target} lies in {source}: its images would be overwritten or translated again; "
            "choose another folder for the translations"
        )
    names: dict[Path, Path] = {}
    for p in paths:
        name = p.relative_to(source).with_suffix(".png")
        if name in names:
            raise RequestError(
                f"{names[name]} and {p} would both become {target / name}; rename one of them"
            )
        names[name] = p
    task = load_task(path, "cyclegan")
    _make_folder(target)
    assert isinstance(task, CycleGAN)
    net = task.averaged["G_A" if direction == "AtoB" else "G_B"]
    multiple = 2**task.model.downsamplings
    unreadable = []
    with task.norm_backend():
        for name, p in tqdm(names.items(), unit="image"):
            try:
                image = to_tensor(open_image(p, task.cfg.data.channels))
            except RequestError as error:
                unreadable.append(str(error))
                continue
            written = target / name
            written.parent.mkdir(parents=True, exist_ok=True)
            _write(_any_size(net, image.to(task.device), multiple), written)
    print(f"{len(names) - len(unreadable)} images in {target}")
    if unreadable:
        raise RequestError(f"{len(unreadable)} of {len(names)} not translated: {unreadable[0]}")


def _write(image: Tensor, path: Path) -> None:
    """A PNG that is never there by half."""
    partial = path.with_suffix(".partial")
    to_image(image).save(partial, format="PNG")
    os.replace(partial, path)


def _any_size(net: torch.nn.Module, image: Tensor, multiple: int) -> Tensor:
    """Run a generator on one image (C, H, W) of any size, its border repeated where needed."""
    _, height, width = image.shape
    # Below this the reflection padding has nothing to reflect.
    smallest = 4 * multiple
    down = max(-height % multiple, smallest - height)
    right = max(-width % multiple, smallest - width)
    padded = pad(image.unsqueeze(0), (0, right, 0, down), mode="replicate")
    return net(padded)[0, :, :height, :width]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write to the folder {path}: {error.strerror}") from error
