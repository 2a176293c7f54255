"""`python -m gannorm export`: networks in a file that others read."""

import argparse
import copy
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from gannorm.commands.composition import composed
from gannorm.commands.trained import make_folder, task_of
from gannorm.errors import RequestError
from gannorm.tasks import Task
from gannorm.training import card, exchange, weights
from gannorm.training.report import versions

SUFFIXES = {
    "reference": ".pth",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
}
EXAMPLE = "example: python -m gannorm export outputs/RUN --format onnx --net G_A --out horse.onnx"


def add(commands: Any) -> None:
    four = commands.add_parser(
        "export", help="write networks as ONNX, safetensors, torch.export or reference CycleGAN",
        epilog=EXAMPLE,
    )  # fmt: skip
    four.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    four.add_argument("--format", dest="form", choices=tuple(SUFFIXES), required=True)
    four.add_argument("--out", type=Path, metavar="FILE", required=True)
    four.add_argument(
        "--net", metavar="NAME", help="G_A, G_B, G, D_A ...; all by default, where one file can"
    )
    four.add_argument(
        "--weights", choices=("averaged", "trained"), default="averaged",
        help="of the generators (averaged)",
    )  # fmt: skip
    four.add_argument(
        "--size", default="dynamic", metavar="dynamic|HxW",
        help="of images, for onnx and torch-export (dynamic)",
    )  # fmt: skip
    four.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    export(a.checkpoint, a.form, a.out, a.net, a.weights, a.size)


def export(
    path: Path, form: str, out: Path, name: str | None, use: str, size: str = "dynamic"
) -> None:
    """Write `out` and its model card: README.md in its folder, or, if there is one, `out` as .md.

    An ONNX or torch.export file gets its name when its outputs have been compared.

    Raises:
        RequestError: networks, a format or a size that do not go together.
    """
    fixed = _size(size)
    if out.suffix != SUFFIXES[form]:
        raise RequestError(f"--out {out}: a file of --format {form} ends in {SUFFIXES[form]}")
    if fixed is not None and form in ("reference", "safetensors"):
        raise RequestError(f"--size {size}: weights alone have no size; leave the option out")
    if form == "onnx":
        exchange.check_onnx_packages()
    found = weights.read(path)
    task = task_of(found)
    nets = _picked(task, found, name, use, form)
    described = card.place(out)
    _check_places(out, described, found.path)
    about: dict[str, Any] = {
        "networks": list(nets),
        "weights": use if found.averaged else found.about.get("weights", "as in the file"),
        "data": found.about.get("data", "unknown" if found.config is None else None),
        **{key: found.about.get(key) for key in ("num_classes", "class_names", "step", "versions")},
    }
    config = _public(found.config or _plain(found))
    one = next(iter(nets))
    kind = "discriminators" if one[0] == "D" else "averaged"
    loading = {"net": one, "attribute": f'{kind}["{one}"]'}
    if form == "reference":
        state = exchange.reference_state(task, one, nets[one])
        loading["options"] = exchange.reference_options(task, one)
        write = partial(torch.save, state)
    elif form == "safetensors":
        said = {"format": "gannorm", "config": json.dumps(config), "about": json.dumps(about)}
        write = partial(save_file, weights.tensors(nets), metadata=said | versions())
    else:
        net = exchange.traced(task, one, nets[one], fixed)
        about["size"] = net.size
        loading["inputs"] = _example(net, form)
        how = exchange.write_onnx if form == "onnx" else exchange.write_torch_export
        write = partial(how, net)
    text = card.card(out, form, task, config, about, _summary(found.path), loading)
    make_folder(out.parent)
    _write(write, out)
    _write(lambda partial: partial.write_text(text, encoding="utf-8"), described)
    print(f"{', '.join(nets)} in {out}, described in {described}")
    if form == "reference":
        print(f"the reference code's options: {loading['options']}")


def _picked(
    task: Task, found: weights.Weights, name: str | None, use: str, form: str
) -> dict[str, nn.Module]:
    """The networks to write, by name."""
    if use == "trained" and found.about.get("weights") == "averaged":
        raise RequestError(f"--weights trained: {found.path} holds the averaged generators alone")
    generators = task.averaged if use == "averaged" else task.generators
    nets = {**generators, **task.discriminators}
    if name is None and form == "safetensors":
        return nets
    if name is None and len(generators) == 1:
        name = next(iter(generators))
    if name not in nets:
        said = "" if name is None else f" {name}"
        raise RequestError(
            f"--net{said}: {found.path} holds {', '.join(nets)}; choose one of them with --net"
        )
    return {name: nets[name]}


def _size(text: str) -> tuple[int, int] | None:
    """Height and width, or None for "dynamic"."""
    if text == "dynamic":
        return None
    sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if sides is None:
        raise RequestError(f"--size {text}: write dynamic, or height x width as 256x256")
    return int(sides[1]), int(sides[2])


def _check_places(out: Path, described: Path, source: Path) -> None:
    """Refuse to write over what was not exported."""
    read = source.resolve()
    among = out.exists() and read.is_dir() and out.resolve().parent == read
    if out.is_dir() or out.resolve() == read or among:
        raise RequestError(f"--out {out} is a folder, or the file to export; choose another name")
    if described.exists() and card.MARK not in described.read_text(encoding="utf-8"):
        raise RequestError(f"{described}, where the model card would go, is there; move it away")


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the names of folders of this machine."""
    said = copy.deepcopy(config)
    said["resume"] = None
    for section, key, neutral in (
        ("init_from", "path", None), ("metrics", "weights", None),
        ("metrics", "cache", "~/.cache/gannorm"), ("data", "root", "unknown"),
    ):  # fmt: skip
        if said.get(section, {}).get(key) is not None:
            said[section][key] = neutral
    return said


def _plain(found: weights.Weights) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed(found.overrides()), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _summary(source: Path) -> dict[str, Any] | None:
    """summary.json of the run whose checkpoint this is."""
    file = source.parent.parent / "summary.json"
    if source.parent.name != "checkpoints" or not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _example(net: exchange.Traced, form: str) -> str:
    """Inputs of the second example's shapes, as the code that makes them."""
    module = "np" if form == "onnx" else "torch"
    shown = []
    for name, each in zip(net.inputs, net.examples[1], strict=True):
        dtype = f"dtype={module}.{str(each.dtype).removeprefix('torch.')}"
        shown.append(f'"{name}": {module}.zeros({tuple(each.shape)}, {dtype})')
    return "{" + ", ".join(shown) + "}"


def _write(write: Any, path: Path) -> None:
    """A file that is never there by half: `write` gets the name it has until it is whole."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
