"""Norms by torch's own operators: what a graph that others will run is made of.

An exported model must not need gannorm, and whoever reads it (ONNX, quantizers, AOTInductor,
DTensor) knows these operators by name: they fold a batch norm into its convolution, or shard it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gannorm.norms import composed
from gannorm.norms.composed import NormSpec, finish, is_plain


def is_asked(*tensors: Tensor | None) -> bool:
    """Whether a call on these is to be seen as an operator of torch's."""
    return composed.recorded() or not all(map(is_plain, tensors))


def supports(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None = None, var: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether torch's operators take these: of one dtype, both statistics or none, and values."""
    others = weight, bias, mean, var
    alike = all(t is None or t.dtype == x.dtype for t in others)
    return alike and (mean is None) == (var is None) and x.numel() > 0


def forward(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,  # (C,), or (K, C) with labels
    bias: Tensor | None,
    labels: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,  # (C,), like var: given, or the running one, which moves
    var: Tensor | None,
    momentum: float,
    given: bool,
    instance: bool,
    biased: bool,  # the running variance, which torch's batch norm divides by one less
    spec: NormSpec,
) -> Tensor:
    moved = var.clone() if biased and var is not None else var
    gain, shift = (None, None) if labels is not None else (weight, bias)
    cudnn = torch.backends.cudnn.enabled
    if given or spec.groups == 0:
        y = torch.batch_norm(x, gain, shift, mean, moved, not given, momentum, spec.eps, cudnn)
    elif instance:
        y = torch.instance_norm(x, gain, shift, mean, var, True, momentum, spec.eps, cudnn)
    else:
        y = torch.group_norm(x, spec.groups, gain, shift, spec.eps, cudnn)
    if var is not None and moved is not None and moved is not var:
        count = x.numel() // x.shape[1]
        var.copy_(moved - (moved - (1 - momentum) * var) / count)
    if labels is not None:
        inner = (...,) + (None,) * (x.dim() - 2)
        if weight is not None:
            y = y * F.embedding(labels, weight)[inner]
        if bias is not None:
            y = y + F.embedding(labels, bias)[inner]
    y = finish(y, residual, spec, False)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast makes it float32
