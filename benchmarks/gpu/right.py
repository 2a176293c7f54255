"""Stage 1, "right": every norm in every dtype, layout, plan and epilogue against float64.

One item is one combination: forward, running statistics and all gradients, and the same bits on a
second run. `benchmarks.gpu.checks` has the items that are not combinations.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from gannorm.norms import functional as G

NORMS = (
    "instance", "instance_affine", "conditional_instance", "batch", "conditional_batch", "group",
    "layer",
)  # fmt: skip
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
LAYOUTS = ("nchw", "channels_last", "sliced", "offset")
PLANS = ("persistent", "looped", "split", "given")
# Activation; a residual; added behind the activation.
EPILOGUES: dict[str, tuple[str | None, bool, bool]] = {
    "none": (None, False, False),
    "relu": ("relu", False, False),
    "leaky_relu": ("leaky_relu", False, False),
    "silu": ("silu", False, False),
    "residual": (None, True, False),
    "residual+relu": ("relu", True, False),
    "residual_after": ("leaky_relu", True, True),
}
GIVEN = ("instance", "instance_affine", "batch", "conditional_batch")  # that evaluate with these
EVEN, UNEVEN = (4, 8, 16, 16), (3, 6, 10, 13)
TINY = ((2, 4, 4, 4), (3, 4, 3, 5))  # the same, rehearsed
CLASSES, GROUPS, EPS, SLOPE, MOMENTUM = 3, 2, 1e-5, 0.2, 0.3
# Of the largest value of an output, of a gradient's norm: half a unit of the dtype and more.
TOLERANCE = {
    "fp64": (1e-11, 1e-10), "fp32": (2e-6, 2e-5), "fp16": (7e-4, 2e-3), "bf16": (5e-3, 1e-2),
}  # fmt: skip
KINK = 1e-3  # nearer to 0 than this, an activation's slope is not asked for


class Combination(NamedTuple):
    norm: str
    dtype: str = "fp32"
    layout: str = "nchw"
    plan: str = "persistent"
    epilogue: str = "none"

    def __str__(self) -> str:
        return " ".join(self)


def combinations() -> list[Combination]:
    """All there are: each norm under each plan first, the rest in an order that is always the same
    and soon has met every pair."""
    plain = [Combination(n, plan=p) for p in PLANS for n in NORMS if p != "given" or n in GIVEN]
    every = [
        Combination(*c)
        for c in product(NORMS, DTYPES, LAYOUTS, PLANS, EPILOGUES)
        if c[3] != "given" or c[0] in GIVEN
    ]
    rest = [c for c in every if c not in set(plain)]
    random.Random(0).shuffle(rest)
    return plain + rest


def few(found: list[Combination], least: int) -> list[Combination]:
    """The first `least`, and as many more as it takes to meet every value of every factor."""
    chosen, met = found[:least], {value for c in found[:least] for value in c}
    for c in found[least:]:
        if not met.issuperset(c):
            chosen.append(c)
            met.update(c)
    return chosen


@dataclass
class Inputs:
    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    labels: Tensor | None
    residual: Tensor | None
    mean: Tensor | None  # given, or running
    var: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        return {name: t for name, t in named.items() if t is not None}


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.cat((values, values), 1)[:, : values.shape[1]]
    if layout == "offset":  # by one element: no address is a multiple of 16 bytes
        memory = values.new_empty(values.numel() + 1)[1:]
        return memory.copy_(values.flatten()).view(values.shape)
    return values


def inputs(c: Combination, shape: tuple[int, ...], device: str) -> Inputs:
    """Of a combination, the same on every machine; the leaves require gradients."""
    generator = torch.Generator().manual_seed(0)
    n, channels = shape[:2]
    dtype = DTYPES[c.dtype]
    wide = torch.float64 if c.dtype == "fp64" else torch.float32

    def draw(*sizes: int, offset: float = 0.0, to: torch.dtype = wide) -> Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float64) + offset
        return values.to(device=device, dtype=to)

    affine = c.norm != "instance"
    table = (CLASSES, channels) if c.norm.startswith("conditional") else (channels,)
    moving = c.norm in GIVEN
    made = Inputs(
        x=laid_out(1.5 * draw(*shape, offset=0.3, to=dtype), c.layout),
        dy=draw(*shape, to=dtype),
        weight=draw(*table, offset=1.0) if affine else None,
        bias=draw(*table) if affine else None,
        labels=(torch.arange(n) % CLASSES).to(device) if len(table) == 2 else None,
        residual=draw(*shape, to=dtype) if EPILOGUES[c.epilogue][1] else None,
        mean=draw(channels) if moving else None,
        var=draw(channels).square() + 0.5 if moving else None,
    )
    for leaf in made.leaves().values():
        leaf.requires_grad_()
    return made


def ours(c: Combination, t: Inputs, group: str | None = None) -> Tensor:
    """group: of processes that a batch norm is over."""
    activation, _, after = EPILOGUES[c.epilogue]
    e: dict[str, Any] = {
        "activation": activation, "negative_slope": SLOPE, "residual": t.residual,
        "residual_after_activation": after,
    }  # fmt: skip
    if group is not None:
        e["process_group"] = group
    own, x, affine = c.plan != "given", t.x, (t.weight, t.bias)
    if c.norm in ("instance", "instance_affine"):
        return G.instance_norm(x, t.mean, t.var, *affine, own, MOMENTUM, EPS, **e)
    if c.norm == "batch":
        return G.batch_norm(x, t.mean, t.var, *affine, own, MOMENTUM, EPS, **e)
    if c.norm in ("group", "layer"):
        return G.group_norm(x, 1 if c.norm == "layer" else GROUPS, *affine, EPS, **e)
    assert t.labels is not None
    if c.norm == "conditional_instance":
        return G.conditional_instance_norm(x, t.labels, *affine, EPS, **e)
    return G.conditional_batch_norm(x, t.labels, t.mean, t.var, *affine, own, MOMENTUM, EPS, **e)


class Answer(NamedTuple):
    y: Tensor
    mean: Tensor | None  # the running ones, moved
    var: Tensor | None
    grads: dict[str, Tensor]
    inner: Tensor | None = None  # what the activation is applied to


def answer(c: Combination, t: Inputs) -> Answer:
    """What ours gives; the running statistics of `t` stay as they are."""
    mean, var = (None if s is None else s.clone() for s in (t.mean, t.var))
    y = ours(c, Inputs(t.x, t.dy, t.weight, t.bias, t.labels, t.residual, mean, var))
    leaves = t.leaves()
    grads = torch.autograd.grad(y, list(leaves.values()), t.dy)
    return Answer(y.detach(), mean, var, dict(zip(leaves, grads, strict=True)))


def oracle(c: Combination, t: Inputs) -> Answer:
    """The definition in float64, on the CPU; its dy is 0 where the slope is not asked for."""
    leaves = {k: v.detach().cpu().double().requires_grad_() for k, v in t.leaves().items()}
    n, channels, *plane = t.x.shape
    x = leaves["x"]
    across = c.norm.endswith("batch") or c.plan == "given"
    groups = {"group": GROUPS, "layer": 1}.get(c.norm, channels)
    sets = x if across else x.reshape(n, groups, channels // groups, -1)
    dims = [0, *range(2, sets.dim())] if across else [2, 3]
    mean, var = (None if s is None else s.cpu().double() for s in (t.mean, t.var))
    if c.plan == "given":
        assert mean is not None and var is not None
        own = [s.view(1, channels, *[1] * len(plane)) for s in (mean, var)]
    else:
        centre = sets.mean(dims, keepdim=True)
        own = [centre, (sets - centre).square().mean(dims, keepdim=True)]
        if mean is not None and var is not None:
            count = sets.numel() // own[0].numel()
            new = [s.detach().reshape(-1, channels).mean(0) for s in own]
            mean = torch.lerp(mean, new[0], MOMENTUM)
            var = torch.lerp(var, new[1] * count / (count - 1), MOMENTUM)
    z = ((sets - own[0]) / (own[1] + EPS).sqrt()).reshape(x.shape)
    if "weight" in leaves:
        gain, shift = leaves["weight"], leaves["bias"]
        if t.labels is not None:
            gain, shift = gain[t.labels.cpu()], shift[t.labels.cpu()]
        ends = (-1, channels, *[1] * len(plane))
        z = z * gain.reshape(ends) + shift.reshape(ends)
    activation, _, after = EPILOGUES[c.epilogue]
    residual = leaves.get("residual")
    if residual is not None and not after:
        z = z + residual
    kinds = {"relu": F.relu, "silu": F.silu, "leaky_relu": lambda v: F.leaky_relu(v, SLOPE)}
    y = kinds[activation](z) if activation else z
    if residual is not None and after:
        y = y + residual
    dy = t.dy.cpu().double()
    if activation:
        dy = dy.masked_fill(z.abs() < KINK, 0.0)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return Answer(y.detach(), mean, var, dict(zip(leaves, grads, strict=True)), z.detach())


@contextmanager
def planned(plan: str) -> Iterator[None]:
    """Small sets take this plan inside the block, as large ones do."""
    from gannorm.kernels import launch

    bounds: dict[str, Any] = {"PERSISTENT": launch.PERSISTENT}
    if plan in ("split", "looped"):
        bounds = {"PERSISTENT": 0, "TILE": 512, "WAVES": 1}
        bounds |= {"ENOUGH": 0.0, "LOOPED": 512} if plan == "looped" else {"STAGES": 0}
    with mock.patch.multiple(launch, **bounds):
        launch.forget()
        try:
            yield
        finally:
            launch.forget()


def off(a: Tensor, b: Tensor, by_norm: bool = False) -> float:
    """How far `a` is off `b` (float64): its largest error, of the largest value; or by the norm."""
    difference = a.detach().cpu().double() - b
    if by_norm:
        return float(difference.norm() / b.norm().clamp_min(1e-30))
    return float(difference.abs().max() / b.abs().max().clamp_min(1e-30))


def faults(c: Combination, found: Answer, expected: Answer) -> str:
    """What is outside of its tolerance, in words."""
    output, gradient = TOLERANCE[c.dtype]
    statistic = 1e-11 if c.dtype == "fp64" else 1e-5
    errors = {"y": (off(found.y, expected.y), output)}
    for name in ("mean", "var"):
        a, b = getattr(found, name), getattr(expected, name)
        if a is not None:
            errors[f"running {name}"] = off(a, b), statistic
    for name, grad in found.grads.items():
        errors[f"d{name}"] = off(grad, expected.grads[name], by_norm=True), gradient
    words = [f"{name} off by {e:.1e}" for name, (e, limit) in errors.items() if not e <= limit]
    return ", ".join(words)


def same(a: Answer, b: Answer) -> str:
    """Which parts of two answers differ in any bit."""
    pairs = {"y": (a.y, b.y), "running mean": (a.mean, b.mean), "running var": (a.var, b.var)}
    pairs |= {f"d{name}": (grad, b.grads[name]) for name, grad in a.grads.items()}
    differ = [
        name for name, (p, q) in pairs.items()
        if p is not None and q is not None and not torch.equal(p, q)
    ]  # fmt: skip
    return f"{', '.join(differ)} differ" if differ else ""


def asked(c: Combination, shape: tuple[int, ...], device: str) -> tuple[Inputs, Answer]:
    """Inputs, and what is right for them."""
    t = inputs(c, shape, device)
    expected = oracle(c, t)
    if expected.inner is not None and EPILOGUES[c.epilogue][0]:
        t.dy = t.dy.masked_fill(expected.inner.to(device).abs() < KINK, 0.0)
    return t, expected


def check(c: Combination, device: str, shapes: tuple[tuple[int, ...], ...]) -> str:
    """What is wrong with a combination, in words; both shapes are tried."""
    for shape in shapes:
        t, expected = asked(c, shape, device)
        with planned(c.plan):
            found, again = answer(c, t), answer(c, t)
        words = faults(c, found, expected)
        if not words and (differ := same(found, again)):
            words = f"{differ} on the second run"
        if words:
            return f"{words} at {'x'.join(map(str, shape))}"
    return ""
