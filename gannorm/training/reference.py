"""Networks of the reference PyTorch CycleGAN code: what they are, by the keys of their files.

Our keys are the same (`gannorm.models.cyclegan`), so nothing is renamed in either direction.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gannorm.errors import RequestError

State = dict[str, Tensor]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# From whose domain to whose: a discriminator judges the domain that its generator writes.
DOMAINS = {"G_A": "AB", "G_B": "BA", "D_A": "B", "D_B": "A"}
FILE = re.compile(r"(?:(?P<epoch>\w+?)_)?net_(?P<name>[GD](?:_[AB])?)")


def name_of(stem: str, state: State) -> str:
    """The network's name, as the file (without its ending) or else its keys say; the only
    generator of a file is that from A to B."""
    said = FILE.fullmatch(stem)
    name = said["name"] if said else "G" if _is_generator(state) else "D"
    return name if "_" in name else f"{name}_A"


def cleaned(content: Mapping[str, Tensor]) -> State:
    """Keys without the prefix of `DataParallel`; without the running statistics that instance
    norms wrote before torch 0.4, which the reference's own loader drops too."""
    state = {key.removeprefix("module."): value for key, value in content.items()}
    for key in list(state):
        layer, _, last = key.rpartition(".")
        if last in STATISTICS and f"{layer}.weight" not in state:
            del state[key]
    return state


def overrides(networks: Mapping[str, State], where: str) -> list[str]:
    """The config (as overrides) of a CycleGAN that these networks, by name, can be part of.

    where: their file or folder, for the messages.

    Raises:
        RequestError: networks of another kind, or of different sizes.
    """
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, state in networks.items():
        if name not in DOMAINS:
            raise RequestError(
                f"{where}: a CycleGAN has the networks {', '.join(DOMAINS)}, and no {name}; the "
                "file needs its config, as `python -m gannorm export` writes it"
            )
        own = _generator(state, name, where) if name[0] == "G" else _critic(state, name, where)
        for key, value in own.items():
            if found.setdefault(key, value) != value:
                raise RequestError(
                    f"{where}: {origin[key]} and {name} are of no one model: {key} is "
                    f"{found[key]} and {value}; load them one by one"
                )
            origin.setdefault(key, name)
    a, b = (found.pop(f"channels of {domain}", None) for domain in "AB")
    channels = f"[{a},{b}]" if a and b and a != b else a or b
    # Its images are not known; the sizes are those that the reference trains at.
    data = ["data=folder_pair", "data.root=unknown", "data.batch_size=1"]
    given = [f"{key}={value}" for key, value in found.items()]
    return ["model=cyclegan", *data, f"data.channels={channels}", *given]


def _is_generator(state: State) -> bool:
    """A padding comes before its first convolution."""
    return "model.0.weight" not in state


def _convolutions(state: State) -> list[tuple[int, Tensor]]:
    """Indices and weights of the convolutions outside the blocks, in order."""
    found = [(re.fullmatch(r"model\.(\d+)\.weight", key), value) for key, value in state.items()]
    return sorted(
        ((int(m[1]), value) for m, value in found if m and value.dim() == 4), key=lambda p: p[0]
    )


def _generator(state: State, name: str, where: str) -> dict[str, Any]:
    outer = _convolutions(state)
    inner = [re.fullmatch(r"model\.(\d+)\.conv_block\.(\d+)\.weight", key) for key in state]
    blocks = {int(m[1]) for m in inner if m}
    places = {int(m[2]) for m in inner if m and state[m[0]].dim() == 4}
    if (
        len(outer) < 2 or len(outer) % 2 or outer[0][0] != 1 or outer[0][1].shape[2] != 7
        or places - {1, 5, 6} or len(places) > 2
    ):  # fmt: skip
        raise _stranger(state, name, where, "generator (ResNet, reflection-padded)")
    first, last = outer[0][1], outer[-1][1]
    channels = dict(zip(DOMAINS[name], (first.shape[1], last.shape[0]), strict=True))
    return {
        "model.width": first.shape[0],
        "model.blocks": len(blocks),
        "model.downsamplings": len(outer) // 2 - 1,
        "model.dropout": 6 in places,
        **{f"channels of {domain}": count for domain, count in channels.items()},
        "norm": _norm(state, 1, name, where),
    }


def _critic(state: State, name: str, where: str) -> dict[str, Any]:
    outer = _convolutions(state)
    if len(outer) < 2 or outer[0][0] != 0 or any(w.shape[2] != 4 for _, w in outer):
        raise _stranger(state, name, where, "discriminator (PatchGAN)")
    found = {
        "model.d_width": outer[0][1].shape[0],
        "model.d_layers": len(outer) - 2,
        f"channels of {DOMAINS[name]}": outer[0][1].shape[1],
    }
    # The first convolution has a bias and no norm, whatever the others have.
    return found | ({"norm": _norm(state, outer[1][0], name, where)} if len(outer) > 2 else {})


def _norm(state: State, convolution: int, name: str, where: str) -> str:
    """The norm behind the convolution of this index."""
    behind = f"model.{convolution + 1}"
    if f"{behind}.weight" in state:
        if f"{behind}.running_mean" in state:
            return "batch"
        raise RequestError(
            f"{where}: the norms of {name} have weights and no running statistics, which several "
            "norms have; the file needs its config, as `python -m gannorm export` writes it"
        )
    if f"model.{convolution}.bias" in state:
        return "instance"
    raise RequestError(f"{where}: {name} has no norm at all (--norm none), or has lost its keys")


def _stranger(state: State, name: str, where: str, kind: str) -> RequestError:
    shown = ", ".join(list(state)[:3])
    return RequestError(
        f"{where}: {name} is no {kind} of the reference CycleGAN code; its keys begin with {shown}"
    )
