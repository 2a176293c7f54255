"""Networks as others take them: ONNX, torch.export, state_dicts of the reference CycleGAN code."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrize

from gannorm.errors import RequestError
from gannorm.schema import CycleGANConfig, ResBlockGANConfig
from gannorm.tasks import Task
from gannorm.training import reference

CLOSE = 1e-5  # largest difference from this program's own output
BATCHES = 2, 3  # of the examples: sizes 0 and 1 would not stay free


@dataclass(frozen=True)
class Traced:
    """A network that takes tensors alone, in evaluation mode and float32 on the CPU.

    Attributes:
        inputs: names, in order.
        examples: two sets of inputs, of two sizes where sizes are free.
        free: for each input its free dimensions, as torch.export takes them.
        size: the size of images in words, for the model card.
    """

    net: nn.Module
    inputs: tuple[str, ...]
    examples: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    free: tuple[dict[int, Any], ...]
    size: str


def traced(task: Task, name: str, net: nn.Module, size: tuple[int, int] | None) -> Traced:
    """A network of a task, ready to be traced.

    size: height and width that are fixed; None: free, where the network allows it.

    Raises:
        RequestError: a size that it cannot have.
    """
    net = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    for module in net.modules():
        if parametrize.is_parametrized(module):  # a spectral norm, whose division is done now
            parametrize.remove_parametrizations(module, "weight")
    batch: dict[int, Any] = {0: Dim("batch", min=1, max=1 << 16)}
    model, channels = task.cfg.model, task.cfg.data.channel_pair
    if isinstance(model, ResBlockGANConfig):
        if size is not None:
            raise RequestError(f"--size: {name} makes images of one size; leave the option out")
        height, width = task.cfg.data.size
        firsts = [
            torch.randn(n, model.z_dim)
            if name == "G"
            else torch.rand(n, channels[0], height, width) * 2 - 1
            for n in BATCHES
        ]
        names: tuple[str, ...] = ("z" if name == "G" else "image",)
        examples: list[tuple[Tensor, ...]] = [(each,) for each in firsts]
        if task.num_classes is not None:
            names = (*names, "labels")
            examples = [(x, torch.arange(len(x)) % task.num_classes) for x in firsts]
        free = (batch,) * len(names)
        return Traced(net, names, (examples[0], examples[1]), free, f"{height}x{width}")
    assert isinstance(model, CycleGANConfig)
    multiple = 2**model.downsamplings if name[0] == "G" else 2 ** max(model.d_layers, 1)
    smallest = 4 * multiple  # below it there is nothing to reflect, or one value to normalize
    if size is None:
        # Twice the smallest, and two others: a size that equals another would not stay free.
        sizes = [(2 * smallest, 2 * smallest + multiple), (smallest, 3 * smallest)]
        h, w = (Dim(f"{each}_by_{multiple}", min=4, max=1 << 12) for each in ("height", "width"))
        sides = batch | {2: multiple * h, 3: multiple * w}
        said = f"any height and width that are multiples of {multiple}, from {smallest}"
    else:
        if any(side % multiple or side < smallest for side in size):
            raise RequestError(
                f"--size {size[0]}x{size[1]}: {name} takes multiples of {multiple} from {smallest}"
            )
        sizes, sides, said = [size, size], batch, f"{size[0]}x{size[1]}"
    source = channels["AB".index(reference.DOMAINS[name][0])]
    images = [torch.rand(n, source, *each) * 2 - 1 for n, each in zip(BATCHES, sizes, strict=True)]
    return Traced(net, ("image",), ((images[0],), (images[1],)), (sides,), said)


def write_torch_export(net: Traced, path: Path) -> None:
    """A program that `torch.export.load` reads where gannorm is not installed."""
    with quiet():
        program = torch.export.export(net.net, net.examples[0], dynamic_shapes=net.free)
        with path.open("wb") as file:
            torch.export.save(program, file)
        with path.open("rb") as file:
            module = torch.export.load(file).module()
    check(net, lambda inputs: module(*inputs), "torch.export's program")


def check_onnx_packages() -> None:
    """Refuse where a package of the extra `onnx` is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise RequestError(f'--format onnx needs {" and ".join(missing)}: pip install -e ".[onnx]"')


def write_onnx(net: Traced, path: Path) -> None:
    """One file, all weights in it; its dimensions are as free as `net.free` says."""
    import onnxruntime

    with quiet():
        torch.onnx.export(
            net.net, net.examples[0], path, dynamo=True, dynamic_shapes=net.free,
            input_names=list(net.inputs), output_names=["output"], external_data=False,
            verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        fed = {k: v.numpy() for k, v in zip(net.inputs, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    check(net, run, "onnxruntime")


@torch.no_grad()
def check(net: Traced, run: Callable[[tuple[Tensor, ...]], Tensor], who: str) -> None:
    """Compare with the network itself, at both sizes of the examples and for a single image.

    Raises:
        RuntimeError: outputs differ by more than 1e-5 of the largest value, or of 1 where that is
            less, and by more than four times what float32 itself is off from float64.
    """
    first, second = net.examples
    for inputs in (first, second, tuple(each[:1] for each in second)):
        expected = net.net(*inputs)
        difference = float((run(inputs) - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        if difference <= CLOSE * scale:
            continue
        exact = copy.deepcopy(net.net).double()(
            *(each.double() if each.is_floating_point() else each for each in inputs)
        )
        rounding = float((expected - exact).abs().max())
        if not difference <= 4 * rounding:  # NaN too
            raise RuntimeError(
                f"{who} differs by {difference:.1e} from the network, at inputs of "
                f"{[tuple(each.shape) for each in inputs]}"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reference_state(task: Task, name: str, net: nn.Module) -> dict[str, Tensor]:
    """The state_dict that the reference code's loader takes, key for key.

    Raises:
        RequestError: a network that the reference code has not.
    """
    cfg, model = task.cfg, task.cfg.model
    if not isinstance(model, CycleGANConfig):
        raise RequestError(f"--format reference is for a cyclegan; this is a {model.name}")
    norm = cfg.norm
    affine, eps = getattr(norm, "affine", None), getattr(norm, "eps", None)
    reasons = [
        (norm.name not in ("instance", "batch"), f"norm={norm.name}"),
        (affine is not (norm.name == "batch"), f"norm={norm.name} with norm.affine={affine}"),
        (eps != 1e-5, f"norm.eps={eps} (its own is 1e-5)"),
        (model.downsamplings != 2 and name[0] == "G", f"model.downsamplings={model.downsamplings}"),
        (model.d_layers == 0 and name[0] == "D", "model.d_layers=0"),
        (model.d_spectral_norm and name[0] == "D", "model.d_spectral_norm=true"),
    ]
    for applies, what in reasons:
        if applies:
            raise RequestError(
                f"--format reference: the reference CycleGAN code has no {what}; choose --format "
                "safetensors, onnx or torch-export"
            )
    state = {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}
    reference.overrides({name: state}, name)  # which it is recognized by
    return state


def reference_options(task: Task, name: str) -> str:
    """The options under which the reference code builds this network."""
    cfg, model = task.cfg, task.cfg.model
    assert isinstance(model, CycleGANConfig)
    pair = cfg.data.channel_pair
    said = f"--norm {cfg.norm.name} --input_nc {pair[0]} --output_nc {pair[1]}"
    if name[0] == "D":
        return f"{said} --netD n_layers --n_layers_D {model.d_layers} --ndf {model.d_width}"
    # Two sizes have names there; others are built by its class.
    blocks = f"--netG resnet_{model.blocks}blocks" if model.blocks in (6, 9) else ""
    said = f"{said} {blocks or f'(n_blocks={model.blocks})'} --ngf {model.width}"
    return said if model.dropout else f"{said} --no_dropout"
