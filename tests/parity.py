"""Shared by the norm tests: the backends, the epilogue written out in torch, tolerances."""

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("cpu", "torch", "triton")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
EPILOGUES = [
    {},
    {"activation": "relu"},
    {"activation": "leaky_relu", "negative_slope": 0.3},
    {"activation": "silu", "residual": True},
    {"residual": True},
    {"activation": "relu", "residual": True},
    {"activation": "leaky_relu", "residual": True, "residual_after_activation": True},
]


def epilogue(y: Tensor, residual: Tensor | None, e: dict) -> Tensor:
    """The fused epilogue, op by op."""
    after = e.get("residual_after_activation", False)
    if residual is not None and not after:
        y = y + residual
    y = {
        None: lambda t: t,
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, e.get("negative_slope", 0.2)),
        "silu": F.silu,
    }[e.get("activation")](y)
    return y + residual if residual is not None and after else y


def compare(ours, theirs, leaves: list[Tensor], tolerance: float) -> None:
    """ours() and theirs() agree, and so do their gradients with respect to the leaves."""
    a, b = ours(), theirs()
    assert a.dtype == b.dtype and a.shape == b.shape
    dy = torch.randn(a.shape, generator=torch.Generator().manual_seed(7)).to(a.dtype)
    close(a, b, tolerance)
    for ga, gb in zip(
        torch.autograd.grad(a, leaves, dy), torch.autograd.grad(b, leaves, dy), strict=True
    ):
        close(ga, gb, tolerance)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def leaf(*shape: int, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=dtype) + offset).requires_grad_()
