"""First and second derivatives of every op on both backends, and what is kept for them."""

import pytest
import torch
from parity import BACKENDS, leaf

from gannorm import use_backend
from gannorm.norms import functional as G

LABELS = torch.tensor([2, 0, 2])
EVAL = torch.randn(2).double(), torch.rand(2).double() + 0.5

OPS = {
    "instance": lambda x, w, b, **e: G.instance_norm(x, weight=w[0], bias=b[0], **e),
    "group": lambda x, w, b, **e: G.group_norm(x, 2, w[0], b[0], **e),
    "layer": lambda x, w, b, **e: G.group_norm(x, 1, w[0], b[0], **e),
    "batch": lambda x, w, b, **e: G.batch_norm(x, None, None, w[0], b[0], True, **e),
    "batch_eval": lambda x, w, b, **e: G.batch_norm(x, *EVAL, w[0], b[0], False, **e),
    "conditional_batch": lambda x, w, b, **e: G.conditional_batch_norm(
        x, LABELS, None, None, w, b, True, **e
    ),
    "conditional_instance": lambda x, w, b, **e: G.conditional_instance_norm(x, LABELS, w, b, **e),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation,after", [(None, False), ("leaky_relu", False), ("silu", True)])
def test_gradcheck_and_gradgradcheck(backend, op, activation, after):
    torch.manual_seed(0)
    x, w, b, r = leaf(3, 2, 1, 3), leaf(3, 2), leaf(3, 2), leaf(3, 2, 1, 3)

    def f(x, w, b, r):
        return OPS[op](x, w, b, activation=activation, residual=r, residual_after_activation=after)

    with use_backend(backend):
        torch.autograd.gradcheck(f, (x, w, b, r), fast_mode=True)
        torch.autograd.gradgradcheck(f, (x, w, b, r), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_per_element(backend):
    torch.manual_seed(0)
    x, w, b = leaf(2, 3, 4), leaf(3, 4), leaf(3, 4)

    def norm(x, w, b):
        return G.layer_norm(x, (3, 4), w, b)

    with use_backend(backend):
        inputs = (x, w, b)
        torch.autograd.gradcheck(norm, inputs, fast_mode=True)
        torch.autograd.gradgradcheck(norm, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_penalty_trains(backend):
    """The way a GAN uses it: a penalty on the input's gradient, down to the weights."""
    torch.manual_seed(0)
    x, w, b = leaf(3, 4, 2, 2), leaf(4), leaf(4)

    def penalty(norm):
        (dx,) = torch.autograd.grad(norm().square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, w, b])

    with use_backend(backend):
        ours = penalty(lambda: G.instance_norm(x, weight=w, bias=b))
    theirs = penalty(lambda: torch.nn.functional.instance_norm(x, weight=w, bias=b))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["torch", "triton"])  # torch's own kernels stop at 2
def test_third_order(backend):
    torch.manual_seed(0)
    x = leaf(2, 1, 1, 3)

    def third(norm):
        g = norm(x).pow(3).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
            g = g.pow(2)
        return g

    with use_backend(backend):
        ours = third(G.instance_norm)

    def composite(x):  # torch's own instance norm stops at the second order
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt()

    torch.testing.assert_close(ours, third(composite))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "keywords,kept",
    [
        ({}, 1),
        ({"activation": "relu"}, 1),
        ({"residual": True}, 1),
        ({"activation": "relu", "residual": True, "residual_after_activation": True}, 1),
        ({"activation": "relu", "residual": True}, 2),  # its sign decides the slope
    ],
)
def test_saves_the_input_and_statistics_alone(backend, keywords, kept):
    x = leaf(2, 3, 8, 8)
    residual = leaf(2, 3, 8, 8) if keywords.get("residual") else None
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with use_backend(backend), hooks:
        G.instance_norm(x, **{**keywords, "residual": residual})
    assert sum(t.numel() == x.numel() for t in saved) == kept
