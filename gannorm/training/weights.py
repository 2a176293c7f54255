"""Networks' weights from files: checkpoints, safetensors, files of the reference CycleGAN code."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gannorm.errors import RequestError
from gannorm.schema import InitConfig
from gannorm.tasks import Task
from gannorm.training import checkpoint, reference
from gannorm.training.reference import State

NETWORKS = ("G", "D", "G_A", "G_B", "D_A", "D_B")
SHOWN = 10  # keys named in a refusal; the rest are counted


@dataclass
class Weights:
    """What a file or folder holds.

    Attributes:
        path: the file, or the folder of several.
        networks: state_dicts by network; of a file with one state for each, that one.
        averaged: of the averaged generators, where the file has both.
        config: as composed for the run that made them; None: only the keys say what they are.
        about: num_classes and, where known, step, versions and `weights`, which of the two the
            networks of a safetensors file were.
    """

    path: Path
    networks: dict[str, State]
    averaged: dict[str, State] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def choose(self, use: str) -> dict[str, State]:
        """The networks, with use="averaged" the averaged generators where there are some."""
        return {**self.networks, **(self.averaged if use == "averaged" else {})}

    def overrides(self) -> list[str]:
        """Of a file without a config: what to compose one from."""
        return reference.overrides(self.networks, str(self.path))


# ---- read


def read(path: Path) -> Weights:
    """The weights in a checkpoint, a run folder, a .safetensors file, a file of the reference code
    (latest_net_G_A.pth), or a folder of such files.

    Raises:
        RequestError: nothing there, something else, or a file that would run code.
    """
    path = path.expanduser()
    if path.is_dir() and checkpoint.newest(path) is None:
        return _read_folder(path)
    file = checkpoint.resolve(path)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    content = checkpoint.read(file)
    if isinstance(content, dict) and isinstance(content.get("format"), int):
        return _of_run(file, checkpoint.complete(checkpoint.checked(content, file), file))
    state = _state(content, file)
    return Weights(file, {reference.name_of(file.stem, state): state})


def _read_folder(folder: Path) -> Weights:
    """The networks of the latest epoch that has a generator."""
    epochs: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*net_*.pth")):
        said = reference.FILE.fullmatch(path.stem)
        if said:
            epochs.setdefault(said["epoch"] or "", {})[said["name"]] = path
    usable = [epoch for epoch, files in epochs.items() if any(n[0] == "G" for n in files)]
    if not usable:
        raise RequestError(
            f"{folder} holds no checkpoints/step_*.pt and no latest_net_G_A.pth or other "
            "*_net_G*.pth"
        )
    age = {epoch: (epoch == "latest", int(epoch) if epoch.isdigit() else -1) for epoch in usable}
    files = epochs[max(usable, key=age.__getitem__)]
    networks: dict[str, State] = {}
    for path in files.values():
        state = _state(checkpoint.read(path), path)
        networks.setdefault(reference.name_of(path.stem, state), state)
    return Weights(folder, networks)


def _of_run(file: Path, content: dict[str, Any]) -> Weights:
    task = content["task"]
    about = {key: content.get(key) for key in ("num_classes", "class_names", "step", "versions")}
    return Weights(file, task["networks"], task["averaged"], content["config"], about)


def _read_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, "pt") as opened:
            content = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            said = opened.metadata() or {}
    except SafetensorError as error:
        raise RequestError(f"{file} is not a safetensors file, or is damaged: {error}") from error
    networks = split(content)
    if not networks:
        state = _state(content, file)
        networks = {reference.name_of(file.stem, state): state}
    if said.get("format") != "gannorm":
        return Weights(file, {name: reference.cleaned(each) for name, each in networks.items()})
    try:
        about = json.loads(said["about"])
        config = json.loads(said["config"])
    except (KeyError, ValueError) as error:
        raise RequestError(f"{file}: its metadata `about` and `config` are no JSON") from error
    return Weights(file, networks, config=config, about=about)


def split(content: Mapping[str, Tensor]) -> dict[str, State]:
    """Tensors by network, where every key begins with the name of one; or nothing."""
    networks: dict[str, State] = {}
    for key, value in content.items():
        name, _, rest = key.partition(".")
        if name not in NETWORKS:
            return {}
        networks.setdefault(name, {})[rest] = value
    return networks


def _state(content: Any, file: Path) -> State:
    """A file's content as one state_dict."""
    if not isinstance(content, Mapping) or not content:
        raise RequestError(f"{file} holds no networks: neither a checkpoint nor a state_dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise RequestError(
                f"{file} is no checkpoint of gannorm and no plain state_dict: {key!r} is a "
                f"{type(value).__name__}"
            )
    return reference.cleaned(content)


# ---- load


def start(task: Task, cfg: InitConfig) -> list[str]:
    """Begin a task's networks with those of `init_from`; averaged generators are copies.

    Returns lines that say what was taken and what was left as it was.

    Raises:
        RequestError: no network of the task's in the file; with `strict`, a key that does not fit.
    """
    assert cfg.path is not None
    weights = read(Path(cfg.path))
    given = weights.choose(cfg.use)
    taken = [name for name in task.networks if name in given]
    if not taken:
        raise RequestError(
            f"init_from={cfg.path} holds the networks {', '.join(given)}; "
            f"model={task.cfg.model.name} has {', '.join(task.networks)}"
        )
    faults = list(_faults({name: task.networks[name] for name in taken}, given))
    if faults and cfg.strict:
        raise RequestError(
            f"init_from={cfg.path} does not fit: {_few(faults)}; {_made_of(weights)}repeat its "
            "model, norm and channels, or leave what does not fit at its fresh weights with "
            "init_from.strict=false"
        )
    for name in taken:
        _load(task.networks[name], given[name])
        if name in task.averaged:
            task.averaged[name].load_state_dict(task.networks[name].state_dict())
    fresh = [name for name in task.networks if name not in taken]
    lines = [f"weights of {', '.join(taken)} from {weights.path}"]
    lines += [f"fresh weights: {', '.join(fresh)}"] if fresh else []
    return lines + [f"left as it was: {fault}" for fault in faults]


def install(task: Task, weights: Weights) -> None:
    """Give an untrained task the weights of a file, for use; networks that the file has not are
    removed. Where it has no averaged generators, those are the trained ones themselves.

    Raises:
        RequestError: a key that does not fit.
    """
    nets = {name: net for name, net in task.networks.items() if name in weights.networks}
    faults = list(_faults(nets, weights.networks))
    averaged = {name: net for name, net in task.averaged.items() if name in weights.averaged}
    faults += _faults(averaged, weights.averaged)
    if faults or not nets:
        raise RequestError(
            f"{weights.path} does not hold what its config says: "
            f"{_few(faults) if faults else 'none of ' + ', '.join(task.networks)}"
        )
    for name, net in nets.items():
        _load(net, weights.networks[name])
    for name, net in averaged.items():
        _load(net, weights.averaged[name])
    for kind in (task.generators, task.discriminators):
        for name in kind.keys() - nets:
            del kind[name]
    for name in task.averaged.keys() - averaged:
        del task.averaged[name]
    for name in task.generators.keys() - averaged:
        task.averaged[name] = task.generators[name].eval().requires_grad_(False)


def _faults(nets: Mapping[str, nn.Module], given: Mapping[str, State]) -> Iterator[str]:
    """Every key that the file lacks, has too many, or has in another shape."""
    for name, net in nets.items():
        here, there = net.state_dict(), given[name]
        for key in here:
            if key not in there:
                yield f"{name}.{key} is missing in the file"
            elif here[key].shape != there[key].shape:
                yield (
                    f"{name}.{key} is {tuple(there[key].shape)} in the file, "
                    f"{tuple(here[key].shape)} here"
                )
        for key in there:
            if key not in here:
                yield f"{name}.{key} is in the file only"


def _load(net: nn.Module, state: State) -> None:
    """What fits."""
    here = net.state_dict()
    fitting = {k: v for k, v in state.items() if k in here and here[k].shape == v.shape}
    net.load_state_dict(fitting, strict=False)


def _few(faults: list[str]) -> str:
    more = len(faults) - SHOWN
    return ", ".join(faults[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _made_of(weights: Weights) -> str:
    """The file's model and norm, or nothing where they cannot be told."""
    if weights.config is not None:
        model, norm = weights.config.get("model", {}), weights.config.get("norm", {})
        keys = ("width", "blocks", "downsamplings", "dropout", "d_width", "d_layers", "g_widths")
        said = [f"model.{key}={model[key]}" for key in keys if key in model]
        said = [f"model={model.get('name')}", f"norm={norm.get('name')}", *said]
    else:
        try:
            said = [each for each in weights.overrides() if not each.startswith("data=")]
        except RequestError:
            return ""
    return f"the file is of {' '.join(said)}; "


def tensors(nets: Mapping[str, nn.Module]) -> State:
    """All networks' tensors, by "network.key", each with memory of its own."""
    return {
        f"{name}.{key}": value.detach().cpu().clone().contiguous()
        for name, net in nets.items()
        for key, value in net.state_dict().items()
    }
