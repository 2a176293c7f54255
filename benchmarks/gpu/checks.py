"""Stage 1, "right", less its combinations: what else a kernel must not get wrong."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library

from benchmarks import timing
from benchmarks.gpu import right
from benchmarks.gpu.right import Answer, Combination, Inputs
from gannorm.norms import functional as G

FAR = 2**30 + 1024  # twice it is past 2^31
DENSE = (3, 8, 9600, 9600)  # 2.2e9 elements
DENSE_BYTES = 40e9  # what is to be free for them
SKIPPED = "skipped: "


class Place:
    """Where a check runs, and how small."""

    def __init__(self, device: str, rehearsed: bool) -> None:
        self.device, self.rehearsed = device, rehearsed
        self.shape: tuple[int, ...] = right.TINY[0] if rehearsed else right.UNEVEN


def nan_stays(norm: str, place: Place) -> str:
    """A NaN in one plane: its own set is NaN, all others as without it."""
    c = Combination(norm, epilogue="leaky_relu")
    t = right.inputs(c, place.shape, place.device)
    clean = right.answer(c, t)
    with torch.no_grad():
        t.x[1, 1, 0, 0] = float("nan")
    found = right.answer(c, t)
    own = torch.zeros_like(clean.y, dtype=torch.bool)
    channels = place.shape[1]
    group = {"group": channels // right.GROUPS, "layer": channels}.get(norm, 1)
    own[:, 1] |= norm.endswith("batch")
    own[1, :group] |= group > 1
    own[1, 1] = True
    words = []
    if not found.y[own].isnan().all():
        words.append("its own set is not all NaN")
    for name, a, b in (("y", found.y, clean.y), ("dx", found.grads["x"], clean.grads["x"])):
        if not torch.equal(a[~own], b[~own]):
            words.append(f"{name} of other sets changed")
    for s in (found.mean, found.var) if norm.endswith("batch") else ():
        assert s is not None
        if not s.isfinite().all():
            words.append("a running statistic took it")
    return ", ".join(words)


def far_apart(norm: str, place: Place) -> str:
    """Offsets past 2^31 elements, in a strided view of memory that is otherwise unused."""
    if not place.rehearsed and torch.cuda.mem_get_info()[0] < 3 * FAR * 2:
        return f"{SKIPPED}needs {3 * FAR * 2 / 1e9:.0f} GB of free memory"
    c = Combination(norm, "fp16")
    memory = torch.empty(2 * FAR + 16, dtype=torch.float16, device=place.device)
    # Samples lie far apart, or the planes of a set that is a group.
    shape, strides = (3, 1, 2, 4), (FAR, 8, 4, 1)
    if norm == "layer":
        shape, strides = (2, 3, 2, 4), (8, FAR, 4, 1)
    t = right.inputs(c, shape, place.device)
    far = memory.as_strided(shape, strides)
    far.copy_(t.x.detach())
    expected = right.oracle(c, t)
    t.x = far.requires_grad_()
    return right.faults(c, right.answer(c, t), expected)


def dense(norm: str, place: Place) -> str:
    """A dense tensor of more than 2^31 elements: the last planes, against the same alone."""
    shape = (2, 3, 8, 8) if place.rehearsed else DENSE
    if not place.rehearsed and torch.cuda.mem_get_info()[0] < DENSE_BYTES:
        return f"{SKIPPED}needs {DENSE_BYTES / 1e9:.0f} GB of free memory"
    x = torch.empty(shape, dtype=torch.bfloat16, device=place.device).normal_().requires_grad_()
    dy = torch.empty_like(x).normal_()

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        if norm == "batch":
            y = G.batch_norm(x, None, None, training=True, activation="relu")
        else:
            y = G.instance_norm(x, activation="relu")
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    found = run(x, dy)
    last = (slice(None), slice(-1, None)) if norm == "batch" else (slice(-1, None), slice(-1, None))
    alone = run(x.detach()[last].contiguous().requires_grad_(), dy[last].contiguous())
    errors = [right.off(a[last], b.cpu().double()) for a, b in zip(found, alone, strict=True)]
    return "" if max(errors) <= 2e-2 else f"y, dx off by {errors[0]:.1e}, {errors[1]:.1e}"


def opcheck(norm: str, place: Place) -> str:
    """The registered operators: schema, fake tensors, autograd (torch's `opcheck`)."""
    from gannorm.norms import ops

    c = Combination(norm, epilogue="residual+relu")
    t = right.inputs(c, (*place.shape[:2], 6), place.device)
    groups = {"group": right.GROUPS, "layer": 1}.get(norm, place.shape[1])
    if norm.endswith("batch"):
        groups = 0
    constants = groups, 1e-5, "relu", 0.2
    arguments = (t.x, t.weight, t.bias, t.labels, t.residual, None, None, *constants, False)
    library.opcheck(torch.ops.gannorm.norm.default, arguments)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    y, stats = ops.norm(*plain)
    back = (y, *plain[:5], stats, *constants, False)
    library.opcheck(torch.ops.gannorm.norm_backward.default, back)
    return ""


def second_derivatives(norm: str, place: Place) -> str:
    """Against finite differences in float64 (torch.autograd.gradgradcheck)."""
    c = Combination(norm, "fp64", epilogue="silu")
    t = right.inputs(c, (3, 2, 1, 3), place.device)
    t.mean = t.var = None
    leaves = t.leaves()

    def run(*values: Tensor) -> Tensor:
        return right.ours(c, Inputs(**vars(t) | dict(zip(leaves, values, strict=True))))

    torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)
    torch.autograd.gradgradcheck(run, tuple(leaves.values()), fast_mode=True)
    return ""


def bad_labels(norm: str, place: Place) -> str:
    """A label that is no row: refused on a CPU; on a GPU NaN for its sample, and for no other."""
    c = Combination(norm)
    t = right.inputs(c, place.shape, place.device)
    clean = right.answer(c, t)
    assert t.labels is not None
    t.labels = t.labels.clone()
    t.labels[1] = right.CLASSES + 7
    unseen: Any = nullcontext()
    if place.rehearsed:
        try:
            right.answer(c, t)
            return "not refused"
        except ValueError:  # and from here on as on a GPU, where labels are not looked at
            unseen = mock.patch.object(G, "check_label_values", lambda *_: None)
    with unseen:
        found = right.answer(c, t)
    others = [n for n in range(place.shape[0]) if n != 1]
    if not found.y[1].isnan().all():
        return "its sample is not NaN"
    if not all(found.grads[name].isfinite().all() for name in ("weight", "bias")):
        return "a gradient of the table took it"
    return "" if torch.equal(found.y[others], clean.y[others]) else "other samples changed"


def other_stream(norm: str, place: Place) -> str:
    """On a stream that is not the default one: the same bits."""
    c = Combination(norm, epilogue="leaky_relu")
    t = right.inputs(c, place.shape, place.device)
    expected = right.answer(c, t)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = right.answer(c, t)
    torch.cuda.current_stream().wait_stream(stream)
    return right.same(found, expected)


def other_device(norm: str, place: Place) -> str:
    """On the second GPU while the first is current: the same bits."""
    if torch.cuda.device_count() < 2:
        return f"{SKIPPED}one device"
    c = Combination(norm, epilogue="leaky_relu")
    expected = right.answer(c, right.inputs(c, place.shape, "cuda:0"))
    found = right.answer(c, right.inputs(c, place.shape, "cuda:1"))
    moved = [None if s is None else s.to("cuda:0") for s in (found.mean, found.var)]
    grads = {name: grad.to("cuda:0") for name, grad in found.grads.items()}
    return right.same(Answer(found.y.to("cuda:0"), moved[0], moved[1], grads), expected)


def in_a_graph(norm: str, place: Place) -> str:
    """Forward and backward captured once, replayed on another input: an eager call's bits."""
    c = Combination(norm, epilogue="residual+relu")
    t = right.inputs(c, place.shape, place.device)
    start = [None if s is None else s.clone() for s in (t.mean, t.var)]

    def run() -> tuple[Tensor, ...]:
        y = right.ours(c, t)
        return y, *torch.autograd.grad(y, list(t.leaves().values()), t.dy)

    graph, (y, *grads) = timing.captured(run, 1)
    with torch.no_grad():
        if not place.rehearsed:  # where a replay does nothing
            t.x.mul_(-0.5).add_(1.0)
            for s, first in zip((t.mean, t.var), start, strict=True):
                if s is not None and first is not None:
                    s.copy_(first)
    graph.replay()
    torch.cuda.synchronize()
    found = Answer(y.detach(), t.mean, t.var, dict(zip(t.leaves(), grads, strict=True)))
    if not place.rehearsed:
        t.mean, t.var = start
    else:
        found = found._replace(mean=None, var=None)
    return right.same(found, right.answer(c, t))


def compiled(norm: str, place: Place) -> str:
    """torch.compile(fullgraph=True), static and dynamic: forward and gradients as eager ones."""
    c = Combination(norm, epilogue="residual+relu")
    words = []
    for dynamic in (False, True):
        torch.compiler.reset()
        t = right.inputs(c, place.shape, place.device)
        expected = right.oracle(c, t)
        assert expected.inner is not None
        t.dy = t.dy.masked_fill(expected.inner.to(t.dy.device).abs() < right.KINK, 0.0)
        step = torch.compile(
            right.ours, fullgraph=True, dynamic=dynamic,
            backend="aot_eager" if place.rehearsed else "inductor",
        )  # fmt: skip
        y = step(c, t)
        grads = torch.autograd.grad(y, list(t.leaves().values()), t.dy)
        found = Answer(y, t.mean, t.var, dict(zip(t.leaves(), grads, strict=True)))
        if wrong := right.faults(c, found, expected):
            words.append(f"{'dynamic' if dynamic else 'static'}: {wrong}")
    return "; ".join(words)


CHECKS: dict[str, tuple[Callable[[str, Place], str], tuple[str, ...]]] = {
    "CUDA graph": (in_a_graph, right.NORMS),
    "NaN stays in its set": (nan_stays, right.NORMS),
    "labels out of range": (bad_labels, ("conditional_instance", "conditional_batch")),
    "another stream": (other_stream, right.NORMS),
    "opcheck": (opcheck, right.NORMS),
    "second derivatives": (second_derivatives, right.NORMS),
    "torch.compile": (compiled, right.NORMS),
    "elements past 2^31, strided": (far_apart, ("instance", "batch", "layer")),
    "elements past 2^31, dense": (dense, ("instance", "batch")),
    "another device": (other_device, right.NORMS),
}
ITEMS = {f"{name}: {norm}": (f, norm) for name, (f, norms) in CHECKS.items() for norm in norms}


def run(item: str, place: Place) -> dict[str, Any]:
    """{"wrong": words, empty if nothing is}, or {"skipped": why}."""
    f, norm = ITEMS[item]
    words = f(norm, place)
    if words.startswith(SKIPPED):
        return {"skipped": words.removeprefix(SKIPPED)}
    return {"wrong": words}
