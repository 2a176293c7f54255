"""What is timed: ops and shapes, ours and torch's way to run them, and a float64 oracle of both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gannorm.norms import functional

CLASSES = 10
EPS = 1e-5
SLOPE = 0.2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Name: activation, and whether a residual is added before it.
EPILOGUES: dict[str, tuple[str | None, bool]] = {
    "none": (None, False),
    "leaky_relu": ("leaky_relu", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "residual": (None, True),
    "residual+relu": ("relu", True),
}
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, SLOPE),
    "silu": F.silu,
}
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One op on one input.

    op: instance (without affine, as in CycleGAN), batch, conditional_batch or group.
    """

    op: str
    shape: Shape  # (N, C, H, W)
    epilogue: str = "none"
    dtype: str = "fp32"
    layout: str = "nchw"  # or channels_last
    groups: int = 0  # of a group norm

    def __str__(self) -> str:
        n, c, h, w = self.shape
        return f"{self.op}-{n}x{c}x{h}x{w}-{self.dtype}-{self.layout}-{self.epilogue}"

    @property
    def activation(self) -> str | None:
        return EPILOGUES[self.epilogue][0]

    @property
    def has_residual(self) -> bool:
        return EPILOGUES[self.epilogue][1]

    def floor(self, direction: str) -> int:
        """Reads and writes of the whole activation that no version can do without.

        Forward: x (and the residual) in, y out. Backward: x and dy in, dx out; the gradient of a
        residual without activation is dy itself; behind one, the residual is read for the
        activation's slope and its gradient is written.
        """
        forward = 2 + self.has_residual
        inner = self.has_residual and self.activation is not None
        backward = 3 + 2 * inner
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def activation_bytes(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w * DTYPES[self.dtype].itemsize


@dataclass
class Tensors:
    x: Tensor
    dy: Tensor
    weight: Tensor | None  # (C,), or (K, C) of a conditional norm
    bias: Tensor | None
    labels: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        return {name: t for name, t in named.items() if t is not None}


def tensors(case: Case, device: str) -> Tensors:
    """Inputs of a case, the same on every machine; the leaves require gradients."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def image(offset: float = 0.0) -> Tensor:
        values = torch.randn(case.shape, generator=generator) + offset
        return values.to(device=device, dtype=dtype).contiguous(memory_format=format)

    def table(offset: float) -> Tensor | None:
        if case.op == "instance":
            return None
        shape = (CLASSES, channels) if case.op == "conditional_batch" else (channels,)
        values = torch.randn(shape, generator=generator) * 0.2 + offset
        # torch's batch norm wants float32 parameters beside bf16, its group norm the input's dtype
        return values.to(device=device, dtype=torch.float32 if case.op == "batch" else dtype)

    samples, channels = case.shape[:2]
    across = case.op in ("batch", "conditional_batch")
    labels = torch.randint(CLASSES, (samples,), generator=generator).to(device)
    made = Tensors(
        x=image(0.5), dy=image(), weight=table(1.0), bias=table(0.0),
        labels=labels if case.op == "conditional_batch" else None,
        residual=image() if case.has_residual else None,
        running_mean=torch.zeros(channels, device=device) if across else None,
        running_var=torch.ones(channels, device=device) if across else None,
    )  # fmt: skip
    for leaf in made.leaves().values():
        leaf.requires_grad_()
    return made


def ours(case: Case, t: Tensors) -> Tensor:
    e: dict[str, Any] = {
        "activation": case.activation, "negative_slope": SLOPE, "residual": t.residual,
    }  # fmt: skip
    if case.op == "instance":
        return functional.instance_norm(t.x, eps=EPS, **e)
    if case.op == "group":
        return functional.group_norm(t.x, case.groups, t.weight, t.bias, EPS, **e)
    if case.op == "batch":
        return functional.batch_norm(
            t.x, t.running_mean, t.running_var, t.weight, t.bias, True, 0.1, EPS, **e
        )
    assert t.labels is not None
    return functional.conditional_batch_norm(
        t.x, t.labels, t.running_mean, t.running_var, t.weight, t.bias, True, 0.1, EPS, **e
    )


def epilogue(case: Case, y: Tensor, residual: Tensor | None) -> Tensor:
    """The epilogue as operations of its own."""
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[case.activation](y)


def eager(case: Case, t: Tensors) -> Tensor:
    """The unfused sequence of torch's own operations."""
    if case.op == "instance":
        y = F.instance_norm(t.x, eps=EPS)
    elif case.op == "group":
        y = F.group_norm(t.x, case.groups, t.weight, t.bias, EPS)
    elif case.op == "batch":
        y = F.batch_norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, True, 0.1, EPS)
    else:
        assert t.weight is not None and t.bias is not None and t.labels is not None
        y = F.batch_norm(t.x, t.running_mean, t.running_var, None, None, True, 0.1, EPS)
        gain, shift = t.weight[t.labels], t.bias[t.labels]
        y = y * gain[:, :, None, None] + shift[:, :, None, None]
    return epilogue(case, y, t.residual)


def oracle(case: Case, t: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients in float64, from the definition."""
    leaves = {k: v.detach().double().requires_grad_() for k, v in t.leaves().items()}
    n, c, h, w = case.shape
    x = leaves["x"]
    sets, dims = x, [0, 2, 3]
    if case.op in ("instance", "group"):
        groups = c if case.op == "instance" else case.groups
        sets, dims = x.reshape(n, groups, c // groups * h, w), [2, 3]
    mean = sets.mean(dims, keepdim=True)
    variance = (sets - mean).square().mean(dims, keepdim=True)
    y = ((sets - mean) / (variance + EPS).sqrt()).reshape(case.shape)
    if "weight" in leaves:
        gain, shift = leaves["weight"], leaves["bias"]
        if t.labels is not None:
            gain, shift = gain[t.labels], shift[t.labels]
        y = y * gain.reshape(-1, c, 1, 1) + shift.reshape(-1, c, 1, 1)
    y = epilogue(case, y, leaves.get("residual"))
    grads = torch.autograd.grad(y, list(leaves.values()), t.dy.double())
    return y.detach(), dict(zip(leaves, grads, strict=True))


# Of the largest value of the output; of a gradient's norm (an activation's kink may fall to
# either side of 0 in single elements).
TOLERANCE = {"fp32": (5e-5, 2e-3), "bf16": (1.5e-2, 1.5e-2)}


def errors(case: Case, t: Tensors, run: Callable[[], Tensor]) -> dict[str, float]:
    """Largest relative error of y, and that of each gradient's norm, against the oracle."""
    y, grads = oracle(case, t)
    got = run()
    got_grads = torch.autograd.grad(got, list(t.leaves().values()), t.dy)
    found = {"y": float((got.detach().double() - y).abs().max() / y.abs().max())}
    for (name, expected), grad in zip(grads.items(), got_grads, strict=True):
        found[f"d{name}"] = float((grad.double() - expected).norm() / expected.norm())
    return found


def wrong(case: Case, found: dict[str, float]) -> str:
    """What lies outside the tolerance, in words; empty if nothing does (NaN does)."""
    output, gradient = TOLERANCE[case.dtype]
    bad = [
        f"{name} off by {value:.1e}"
        for name, value in found.items()
        if not value <= (output if name == "y" else gradient)
    ]
    return ", ".join(bad)


INSTANCE = ((64, 256), (128, 128), (256, 64))  # channels, side
CONDITIONAL = ((1024, 4), (512, 8), (256, 16), (128, 32), (64, 64))


def cuda_cases() -> list[Case]:
    found = []
    for c, s in INSTANCE:
        for n in (1, 2, 4, 8):
            # Every variant at the ends of the range, the common ones between.
            ends = n in (1, 8)
            for e in EPILOGUES if ends else ("relu", "residual"):
                for layout in ("nchw", "channels_last") if ends else ("nchw",):
                    for dtype in DTYPES:
                        found.append(Case("instance", (n, c, s, s), e, dtype, layout))
    for e in EPILOGUES:
        for layout in ("nchw", "channels_last"):
            for dtype in DTYPES:
                for c, s in CONDITIONAL:
                    shape = (64, c, s, s)
                    found.append(Case("conditional_batch", shape, e, dtype, layout))
                found.append(Case("group", (32, 256, 56, 56), e, dtype, layout, 32))
    return found


def cpu_cases() -> list[Case]:
    """The same layers at the sizes that a CPU trains, and torch's own three norms alone."""
    found = []
    for shape in ((64, 256, 8, 8), (64, 128, 16, 16), (64, 64, 32, 32), (16, 64, 64, 64)):
        found.append(Case("conditional_batch", shape, "leaky_relu"))
    for op, groups in (("instance", 0), ("batch", 0), ("group", 8)):
        for e in ("none", "relu", "residual+relu"):
            found.append(Case(op, (16, 64, 32, 32), e, groups=groups))
        for dtype, layout in (("fp32", "channels_last"), ("bf16", "nchw")):
            found.append(Case(op, (16, 64, 32, 32), "none", dtype, layout, groups))
    for c, s in INSTANCE:
        found += [Case("instance", (1, c, s, s), e) for e in ("relu", "residual")]
    found += [Case("conditional_batch", (64, c, s, s), "relu") for c, s in CONDITIONAL]
    found.append(Case("group", (32, 256, 56, 56), "relu", groups=32))
    return found


def quick_cases() -> list[Case]:
    """Few and small: for the tests."""
    return [
        Case("instance", (2, 4, 16, 16), "relu"),
        Case("conditional_batch", (8, 8, 8, 8), "leaky_relu"),
        Case("batch", (4, 8, 8, 8), "residual+relu", "bf16"),
        Case("group", (2, 8, 8, 8), "silu", layout="channels_last", groups=4),
    ]


def growth_cases(quick: bool) -> list[Case]:
    """One layer at growing sizes: where does its time jump?"""
    sides = (
        (16, 24, 32)
        if quick
        else (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
    )
    return [Case("instance", (1, 2 if quick else 32, s, s), "relu") for s in sides]
