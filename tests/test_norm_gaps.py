"""What tests/mutants.py found open in the other norm tests: offsets, layouts, kinks, starts."""

import pytest
import torch
import triton
import triton.language as tl
from parity import BACKENDS, close, leaf
from torch import nn
from torch.nn import functional as F

import gannorm
from gannorm import use_backend
from gannorm.kernels.tile import at
from gannorm.norms import functional as G

FAR = 2**30 + 1024  # twice it is past 2^31


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("shape", [(3, 1, 2, 4), (1, 3, 2, 4)], ids=str)
def test_elements_past_2_31(backend, shape):
    """A strided view of memory that is never touched, and so never there."""
    torch.manual_seed(0)
    memory = torch.empty(2 * FAR + 8, dtype=torch.float16)
    strides = (FAR, 8, 4, 1) if shape[0] == 3 else (8, FAR, 4, 1)
    x = memory.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    dense = x.float().requires_grad_()
    x.requires_grad_()
    norms = (
        lambda x: G.instance_norm(x),
        lambda x: G.batch_norm(x, None, None, training=True, activation="silu"),
    )
    for norm in norms:
        y, expected = norm(x), norm(dense)
        close(y.float(), expected, 2e-3)
        (dx,) = torch.autograd.grad(y.float().pow(3).sum(), x)
        (de,) = torch.autograd.grad(expected.pow(3).sum(), dense)
        close(dx.float(), de, 1e-2)


@triton.jit
def offsets_kernel(offsets_ptr, stride_n, stride_c, stride_s, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    offsets = at(
        i[:, None].to(tl.int64), i[None, :].to(tl.int64), i[None, None, :],
        stride_n, stride_c, stride_s,
    )  # fmt: skip
    to = (i[:, None] * BLOCK + i[None, :])[:, :, None] * BLOCK + i[None, None, :]
    tl.store(offsets_ptr + to, offsets)


def test_tile_offsets_past_2_31():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    offsets = torch.empty(4, 4, 4, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](offsets, 2**30, 2**29 + 1, 2**31 - 1, BLOCK=4)
    i = torch.arange(4)
    n, c, s = i[:, None, None], i[:, None], i
    assert torch.equal(offsets.cpu(), n * 2**30 + c * (2**29 + 1) + s * (2**31 - 1))


@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_ladder_of_offsets(backend, offset):
    """Far from 0 a mean rounded to float32 is off by more than the result may be."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 9, 11) + offset
    close(G.instance_norm(x).double(), F.instance_norm(x.double()), 2e-6)
    y = G.batch_norm(x, None, None, training=True)
    close(y.double(), F.batch_norm(x.double(), None, None, training=True), 2e-6)


def test_an_outlier_at_the_first_element(backend):
    """The shift alone does not save a one-pass variance."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64, 64)
    x[..., 0, 0] = 1e4
    close(G.instance_norm(x).double(), F.instance_norm(x.double()), 1e-5)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_gradient_at_the_kink(backend, activation):
    """At exactly 0 the slope is torch's: that of the negative side."""
    x, b = torch.full((2, 2, 3, 3), 5.0), leaf(2, dtype=torch.float32)
    b.data.zero_()
    r = torch.zeros_like(x).requires_grad_()
    y = G.instance_norm(x, bias=b, activation=activation, residual=r)
    db, dr = torch.autograd.grad(y, [b, r], torch.ones_like(y))
    slope = 0.0 if activation == "relu" else 0.2
    close(dr, torch.full_like(dr, slope), 1e-6)
    close(db, torch.full_like(db, 18 * slope), 1e-6)


LAYOUTS = {
    "every second": lambda: torch.randn(3, 4, 10).double()[..., ::2],
    "transposed": lambda: torch.randn(5, 4, 3).double().transpose(0, 2),
    "swapped": lambda: torch.randn(4, 3, 5).double().transpose(0, 1),
    "sliced channels": lambda: torch.randn(3, 7, 5).double()[:, 2:6],
    "expanded samples": lambda: torch.randn(1, 4, 5).double().expand(3, 4, 5),
    "expanded elements": lambda: torch.randn(3, 4, 1).double().expand(3, 4, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_input_residual_and_gradient(backend, layout):
    torch.manual_seed(0)
    x, r, dy = (LAYOUTS[layout]() for _ in range(3))
    w, b = leaf(4), leaf(4)

    def run(x, r, dy):
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        y = G.instance_norm(
            x, weight=w, bias=b, activation="silu", residual=r, residual_after_activation=True
        )
        z = G.batch_norm(x, None, None, w, b, True, residual=r)
        return [y, z, *torch.autograd.grad([y, z], [x, r, w, b], [dy, dy])]

    ours = run(x, r, dy)
    with use_backend("torch"):
        plain = run(*(t.contiguous() for t in (x, r, dy)))
    for p, q in zip(ours, plain, strict=True):
        close(p, q, 1e-10)


def test_nothing_is_mutated(backend):
    torch.manual_seed(0)
    x, r, w, b = (torch.randn(*s) for s in ((3, 4, 5), (3, 4, 5), (2, 4), (2, 4)))
    labels, stats = torch.tensor([0, 1, 1]), (torch.randn(4), torch.rand(4))
    tensors = (x, r, w, b, labels, *stats)
    before = [t.clone() for t in tensors]
    e = {"activation": "relu", "residual": r}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            G.conditional_batch_norm(x, labels, *stats, w, b, False, **e)
            G.conditional_batch_norm(x, labels, None, None, w, b, True, **e)
            G.instance_norm(x, *stats, use_input_stats=False, **e)
            G.group_norm(x, 2, w[0], b[0], **e, residual_after_activation=True)
    assert all(torch.equal(t, s) for t, s in zip(tensors, before, strict=True))


def test_rows_are_those_of_the_samples(backend):
    """N == C == H * W: no wrong broadcast fails by its shape."""
    torch.manual_seed(0)
    x, w, b = leaf(4, 4, 2, 2), leaf(3, 4), leaf(3, 4)
    labels = torch.tensor([2, 0, 1, 1])
    y = G.conditional_batch_norm(x, labels, None, None, w, b, True)
    plain = F.batch_norm(x, None, None, training=True)
    expected = [p * w[k, :, None, None] + b[k, :, None, None] for p, k in zip(plain, labels)]  # noqa: B905
    close(y, torch.stack(expected), 1e-10)


def test_overflow_of_the_variance_alone(backend):
    """A finite mean with an infinite variance does not enter either."""
    x = torch.tensor([[1e25, 1.0], [-1e25, 2.0], [0.0, 3.0]])
    mean, var = torch.zeros(2), torch.ones(2)
    G.batch_norm(x, mean, var, training=True, momentum=0.5)
    assert mean.isfinite().all() and var.isfinite().all()
    assert mean[1] == 1.0 and mean[0] == 0 and var[0] == 1


def test_what_a_conditional_layer_starts_from():
    norm = gannorm.ConditionalBatchNorm2d(4, 3)
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()
    assert (gannorm.ConditionalInstanceNorm2d(4, 3).weight == 1).all()


def test_a_fused_activation_is_not_replaced():
    norm = gannorm.GroupNorm(2, 4, activation="silu")
    model = nn.Sequential(norm, nn.ReLU())
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    close(gannorm.convert(model)(x), expected, 1e-6)
    assert norm.epilogue.activation == "silu"
