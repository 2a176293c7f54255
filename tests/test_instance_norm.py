"""Statistics inside a sample (instance, group, layer): both backends against torch."""

import pytest
import torch
from pairs import pairs
from parity import BACKENDS, EPILOGUES, TOLERANCE, compare, epilogue, leaf
from torch.nn import functional as F

from gannorm import use_backend
from gannorm.norms import functional as G

# odd, prime, one column, one channel, past one tile
SHAPES = [(2, 4, 3, 5), (1, 3, 7, 1), (3, 1, 2, 2), (1, 2, 67, 71)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype,shape,e", pairs(TOLERANCE, SHAPES, EPILOGUES), ids=str)
def test_against_nn(backend, dtype, shape, e):
    torch.manual_seed(0)
    channels = shape[1]
    groups = 2 if channels % 2 == 0 else 1
    x = leaf(*shape, dtype=dtype, offset=3)
    w, b = leaf(channels, dtype=dtype), leaf(channels, dtype=dtype)
    r = leaf(*shape, dtype=dtype) if e.get("residual") else None
    keywords = {**e, "residual": r}
    leaves = [x, w, b] + ([] if r is None else [r])
    with use_backend(backend):
        compare(
            lambda: G.instance_norm(x, weight=w, bias=b, **keywords),
            lambda: epilogue(F.instance_norm(x, weight=w, bias=b), r, e),
            leaves,
            TOLERANCE[dtype],
        )
        compare(
            lambda: G.group_norm(x, groups, w, b, **keywords),
            lambda: epilogue(F.group_norm(x, groups, w, b), r, e),
            leaves,
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics(backend):
    torch.manual_seed(0)
    x = leaf(3, 4, 5, 5)
    ours = [torch.randn(4).double(), torch.rand(4).double() + 0.5]
    theirs = [t.clone() for t in ours]
    with use_backend(backend):
        y = G.instance_norm(x, *ours, momentum=0.3)
        torch.testing.assert_close(y, F.instance_norm(x, *theirs, momentum=0.3))
        torch.testing.assert_close(ours, theirs)
        y = G.instance_norm(x, *ours, use_input_stats=False)
        expected = F.instance_norm(x, *theirs, use_input_stats=False)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conditional_equals_the_loop_over_samples(backend):
    """N == H too, where a missing dimension would scale rows instead of samples."""
    torch.manual_seed(0)
    x, w, b = leaf(4, 3, 4, 5), leaf(5, 3), leaf(5, 3)
    labels = torch.tensor([4, 0, 4, 2])
    with use_backend(backend):
        compare(
            lambda: G.conditional_instance_norm(x, labels, w, b, activation="relu"),
            lambda: torch.cat(
                [
                    F.relu(F.instance_norm(x[i : i + 1], weight=w[k], bias=b[k]))
                    for i, k in enumerate(labels)
                ]
            ),
            [x, w, b],
            1e-10,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm(backend):
    torch.manual_seed(0)
    x, w, b = leaf(3, 5, 7, 2), leaf(7, 2), leaf(7, 2)
    with use_backend(backend):
        compare(
            lambda: G.layer_norm(x, (7, 2), w, b),
            lambda: F.layer_norm(x, (7, 2), w, b),
            [x, w, b],
            1e-10,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [3.3, 1e3, 1e7, 1e10])
def test_a_constant_plane_gives_exactly_the_bias(backend, value):
    x = torch.full((2, 3, 9, 70), value)
    bias = torch.tensor([0.1, -2.0, 7.0])
    with use_backend(backend):
        y = G.instance_norm(x, weight=torch.full((3,), 5.0), bias=bias)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offsets_do_not_cancel(backend):
    """E[x^2] - E[x]^2 would be wrong in the first digit here."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 40, 40) + 1e4
    with use_backend(backend):
        y = G.instance_norm(x)
    error = (y.double() - F.instance_norm(x.double())).abs().max()
    assert error < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plane_with_nan_poisons_itself_alone(backend):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 2] = torch.nan
    with use_backend(backend):
        y = G.instance_norm(x, activation="relu")
    bad = y.isnan().flatten(2).any(2)
    assert bad.tolist() == [[False, True, False], [False, False, False]]
    assert y[0, 1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_statistics_in_float32(backend, dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 16, 16) * 100 + 300).to(dtype)
    w, b = torch.randn(3), torch.randn(3)
    with use_backend(backend):
        y = G.instance_norm(x, weight=w, bias=b)
    assert y.dtype == dtype
    oracle = F.instance_norm(x.double(), weight=w.double(), bias=b.double())
    # Half a unit in the last place, and what float32 statistics leave.
    unit = torch.finfo(dtype).eps * oracle.abs()
    # Triton's interpreter truncates to bfloat16 where the hardware rounds.
    truncated = backend == "triton" and dtype == torch.bfloat16 and not x.is_cuda
    limit = unit * (1.0 if truncated else 0.5) + 1e-5
    assert ((y.double() - oracle).abs() <= limit).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_comes_back_channels_last(backend):
    x = leaf(2, 3, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    with use_backend(backend):
        y = G.instance_norm(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x)
    for t in (y, dx):
        assert t.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.instance_norm(x))
