"""Other projects' norms, where they are installed (`pip install -e ".[peers]"`).

Each runs its own norm and then the epilogue as separate operations. What a peer cannot do (an op,
a layout, a backward pass) it is not asked for.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import EPS, Case, Tensors, epilogue

PACKAGES = (
    "flag-gems", "liger-kernel", "quack-kernels", "nvidia-cudnn-frontend",
)  # fmt: skip


class Peer(NamedTuple):
    run: Callable[[], Tensor]
    differentiable: bool


def installed() -> dict[str, str]:
    """Version of each peer, or "not installed"."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _flag_gems(case: Case, t: Tensors) -> Peer:
    norm = import_module("flag_gems").instance_norm
    return Peer(
        lambda: epilogue(case, norm(t.x, None, None, None, None, True), t.residual),
        differentiable=True,
    )


def _liger(case: Case, t: Tensors) -> Peer:
    layer_class = import_module("liger_kernel.transformers.group_norm").LigerGroupNorm
    assert t.weight is not None and t.bias is not None
    n, c, h, w = case.shape
    layer = layer_class(num_channels=c, num_groups=case.groups, eps=EPS).to(t.x)
    layer.weight, layer.bias = torch.nn.Parameter(t.weight), torch.nn.Parameter(t.bias)

    def run() -> Tensor:
        return epilogue(case, layer(t.x.reshape(n, c, h * w)).view(case.shape), t.residual)

    return Peer(run, differentiable=False)  # its gradients arrive at the layer's own parameters


def _quack(case: Case, t: Tensors) -> Peer:
    """Layer norm over each plane: the same statistics, a speed ceiling."""
    norm = import_module("quack.rmsnorm").layernorm_fwd
    n, c, h, w = case.shape
    one = torch.ones(h * w, device=t.x.device)

    def run() -> Tensor:
        y = norm(t.x.detach().view(n * c, h * w), one, eps=EPS)
        return epilogue(case, y.view(case.shape), t.residual)

    return Peer(run, differentiable=False)


def _cudnn(case: Case, t: Tensors) -> Peer:
    cudnn = import_module("cudnn")
    kinds = {torch.float32: cudnn.data_type.FLOAT, torch.bfloat16: cudnn.data_type.BFLOAT16}
    channels = case.shape[1]
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=kinds[t.x.dtype], intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT, handle=handle,
    )  # fmt: skip
    x = graph.tensor(name="x", dim=list(t.x.shape), stride=list(t.x.stride()))
    affine = {
        name: graph.tensor(
            name=name, dim=[1, channels, 1, 1], stride=[channels, 1, channels, channels],
            data_type=cudnn.data_type.FLOAT,
        )
        for name in ("scale", "bias")
    }  # fmt: skip
    epsilon = graph.tensor(
        name="epsilon", dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], is_pass_by_value=True,
        data_type=cudnn.data_type.FLOAT,
    )  # fmt: skip
    y, mean, rstd = graph.instancenorm(
        name="norm", norm_forward_phase=cudnn.norm_forward_phase.TRAINING, input=x,
        epsilon=epsilon, **affine,
    )  # fmt: skip
    y.set_output(True)
    for statistic in (mean, rstd):
        statistic.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    like: dict[str, Any] = {"device": t.x.device, "dtype": torch.float32}
    out = torch.empty_like(t.x)
    statistics = [torch.empty((*case.shape[:2], 1, 1), **like) for _ in range(2)]
    arguments = {
        x: t.x.detach(), y: out, mean: statistics[0], rstd: statistics[1],
        affine["scale"]: torch.ones((1, channels, 1, 1), **like),
        affine["bias"]: torch.zeros((1, channels, 1, 1), **like),
        epsilon: torch.full((1, 1, 1, 1), EPS),
    }  # fmt: skip
    workspace = torch.empty(graph.get_workspace_size(), device=t.x.device, dtype=torch.uint8)

    def run() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(arguments, workspace, handle=handle)
        return epilogue(case, out, t.residual)

    return Peer(run, differentiable=False)


def build(case: Case, t: Tensors) -> dict[str, Callable[[], Peer]]:
    """How to build the installed peers that can run this case; on a GPU only."""
    if t.x.device.type != "cuda":
        return {}
    nchw = case.layout == "nchw"
    able: dict[str, tuple[bool, Callable[[Case, Tensors], Peer]]] = {
        "flag-gems": (case.op == "instance" and nchw, _flag_gems),
        "liger-kernel": (case.op == "group" and nchw, _liger),
        "quack-kernels": (case.op == "instance" and nchw, _quack),
        "nvidia-cudnn-frontend": (case.op == "instance", _cudnn),
    }  # fmt: skip
    here = installed()
    return {
        name: functools.partial(make, case, t)
        for name, (serves, make) in able.items()
        if serves and here[name] != "not installed"
    }


def mistaken(case: Case, expected: Tensor, got: Any) -> bool:
    """Whether a peer's output is not the op's: it is then not timed."""
    limit = 2e-2 if case.dtype == "bf16" else 1e-3
    difference = (got.detach().double() - expected).abs().max()
    return not bool(difference <= limit * expected.abs().max())
