"""How a run computes its steps (`trainer.compile`, `cuda_graph`, `checkpointing`, `precision`):
what cannot be is refused before anything is written.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from gannorm import parallel
from gannorm.errors import RequestError
from gannorm.schema import Config
from gannorm.tasks import Task
from gannorm.tasks.checkpointing import checkpoint_blocks
from gannorm.tasks.graph import GraphedStep, Step
from gannorm.tasks.losses import is_penalized

TF32 = (8, 0)  # the first compute capability that has it


def check_options(cfg: Config, device: torch.device) -> None:
    """Refuse what cannot be on this device, or together.

    Raises:
        RequestError: naming the key, the reason and what to set.
    """
    for refusal in _refusals(cfg, device):
        raise RequestError(refusal)


def _refusals(cfg: Config, device: torch.device) -> Iterator[str]:
    trainer, penalized = cfg.trainer, is_penalized(cfg.loss)
    if trainer.precision == "tf32" and not _has_tf32(device):
        yield (
            "trainer.precision=tf32: TF32 is arithmetic of GPUs of compute capability 8.0 or "
            f"later, and this is {_name(device)}; set trainer.precision=fp32"
        )
    if trainer.compile and penalized:
        yield (
            "trainer.compile=true: loss.r1, loss.r2 and loss.gradient_penalty differentiate twice, "
            "and compiled code is differentiable once; set them to 0 (loss=hinge), or "
            "trainer.compile=false"
        )
    if trainer.compile and trainer.checkpointing:
        yield (
            "trainer.compile=true: the compiler cannot see into trainer.checkpointing=true, whose "
            "second pass restores spectral norms and random numbers; set one of them to false"
        )
    if trainer.cuda_graph:
        for reason, way_out in _without_a_graph(cfg, device):
            yield f"trainer.cuda_graph=true: {reason}; set {way_out}, or trainer.cuda_graph=false"


def _without_a_graph(cfg: Config, device: torch.device) -> Iterator[tuple[str, str]]:
    """Why a step cannot be captured, and what to set."""
    if device.type != "cuda":
        yield f"a CUDA graph needs a GPU, and this is {_name(device)}", "trainer.device=cuda"
    if cfg.trainer.precision == "fp16":
        yield (
            "trainer.precision=fp16 decides on the host whether a step is skipped for its loss "
            "scale",
            "trainer.precision=bf16",
        )
    if parallel.world() > 1:
        yield "several processes exchange what they have on the host", "one process"
    if getattr(cfg.data, "preprocess", "") == "none":
        yield (
            "data.preprocess=none gives images of many sizes, and a graph has one",
            "another data.preprocess",
        )
    if cfg.trainer.checkpointing and getattr(cfg.model, "dropout", False):
        yield (
            "trainer.checkpointing=true draws model.dropout's numbers again, which a graph cannot",
            "model.dropout=false",
        )


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32


def _name(device: torch.device) -> str:
    return "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def prepare(task: Task, compiler: str = "inductor") -> None:
    """Checkpoint or compile the networks that are trained; the averaged ones stay as they are.

    compiler: a backend of torch.compile.

    Raises:
        RequestError: nothing can be compiled here.
    """
    if task.cfg.trainer.checkpointing:
        for net in task.networks.values():
            checkpoint_blocks(net)
    if task.cfg.trainer.compile:
        torch.compiler.reset()  # what this process compiled before counts towards a limit
        _try(compiler, task.device)
        for net in task.networks.values():
            net.compile(backend=compiler)  # in place: its keys stay


def _try(compiler: str, device: torch.device) -> None:
    """Something small: what a compiler lacks it tells only when it is used."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=compiler)(torch.ones(2, device=device))
    except Exception as error:
        which = "C++ compiler (CXX, or g++)" if device.type == "cpu" else "Triton with a C compiler"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("backend=")] or [repr(error)]
        raise RequestError(
            f"trainer.compile=true: torch.compile needs a working {which} and failed here: "
            f"{said[0]}; install it, or set trainer.compile=false"
        ) from error


def stepping(task: Task) -> Step:
    """What takes a step: the task itself, or a graph of it."""
    return GraphedStep(task) if task.cfg.trainer.cuda_graph else task.train_step


def eagerly(task: Task) -> AbstractContextManager[object]:
    """Inside, networks run as they are written, and hooks of their layers are called."""
    if not task.cfg.trainer.compile:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
