"""Statistics across the batch (batch, conditional batch): both backends against torch."""

import pytest
import torch
from pairs import pairs
from parity import BACKENDS, EPILOGUES, TOLERANCE, close, compare, epilogue, leaf
from torch.nn import functional as F

from gannorm import use_backend
from gannorm.norms import functional as G

SHAPES = [(4, 3, 4, 5), (5, 2), (7, 1, 3, 1), (2, 3, 67, 71), (37, 1, 8, 9)]


def table_norm(x, labels, w, b, mean, var, training):
    y = F.batch_norm(x, mean, var, training=training)
    rows = [t[labels].view(len(x), -1, *[1] * (x.dim() - 2)) for t in (w, b)]
    return y * rows[0] + rows[1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype,shape,training,e", pairs(TOLERANCE, SHAPES, [True, False], EPILOGUES), ids=str
)
def test_against_nn(backend, dtype, shape, training, e):
    torch.manual_seed(0)
    n, c = shape[:2]
    x = leaf(*shape, dtype=dtype, offset=3)
    r = leaf(*shape, dtype=dtype) if e.get("residual") else None
    w, b = leaf(c, dtype=dtype), leaf(c, dtype=dtype)
    tables = leaf(4, c, dtype=dtype), leaf(4, c, dtype=dtype)
    labels = torch.randint(4, (n,))
    start = torch.randn(c, dtype=dtype), torch.rand(c, dtype=dtype) + 0.5
    plain, conditional, theirs = ([t.clone() for t in start] for _ in range(3))
    extra = [] if r is None else [r]
    with use_backend(backend):
        compare(
            lambda: G.batch_norm(x, *plain, w, b, training, **{**e, "residual": r}),
            lambda: epilogue(F.batch_norm(x, *theirs, w, b, training), r, e),
            [x, w, b, *extra],
            TOLERANCE[dtype],
        )
        compare(
            lambda: G.conditional_batch_norm(
                x, labels, *conditional, *tables, training, **{**e, "residual": r}
            ),
            lambda: epilogue(
                table_norm(x, labels, *tables, *(t.clone() for t in start), training), r, e
            ),
            [x, *tables, *extra],
            TOLERANCE[dtype],
        )
    torch.testing.assert_close(plain, theirs)
    torch.testing.assert_close(conditional, theirs)


@pytest.mark.parametrize("shape", [(4, 6, 16, 16), (3, 5, 24, 10), (2, 3, 67, 71), (16, 3, 8, 8)])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_the_moments_of_large_inputs(op, shape):
    """Of pieces, merged."""
    torch.manual_seed(0)
    x, r, w, b = leaf(*shape), leaf(*shape), leaf(shape[1]), leaf(shape[1])
    ours, theirs = ((torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()) for _ in "ab")
    y = getattr(G, op)(x, *ours, w, b, True, activation="relu", residual=r)
    expected = F.relu(getattr(F, op)(x, *theirs, w, b, True) + r)
    close(y, expected, 1e-12)
    for a, e in zip(ours, theirs, strict=True):
        close(a, e, 1e-12)
    grads = (torch.autograd.grad(t.pow(3).sum(), (x, r, w, b)) for t in (y, expected))
    for a, e in zip(*grads, strict=True):
        close(a, e, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_running_statistics_leave_the_input_alone(backend):
    x = torch.randn(3, 2, 4)
    before = x.clone()
    with use_backend(backend):
        y = G.batch_norm(x, None, None, training=True, activation="relu")
    assert torch.equal(x, before)
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, None, None, training=True)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_biased_running_variance_is_tensorflows(backend):
    x, mean, var = torch.randn(3, 2, 4), torch.zeros(2), torch.ones(2)
    with use_backend(backend):
        G.batch_norm(x, mean, var, training=True, momentum=0.1, var_estimator="biased")
    expected = 0.9 + 0.1 * x.var((0, 2), correction=0)
    torch.testing.assert_close(var, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_batches_never_enter_the_running_statistics(backend):
    x, mean, var = torch.randn(3, 2, 4), torch.zeros(2), torch.ones(2)
    x[1, 0, 2] = torch.inf
    with use_backend(backend):
        y = G.batch_norm(x, mean, var, training=True)
    assert mean[0] == 0 and var[0] == 1 and mean[1] != 0
    assert y[:, 0].isnan().any() and y[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", [None, torch.zeros(3, dtype=torch.int64)])
def test_nor_does_what_their_dtype_cannot_hold(backend, labels):
    x, mean, var = torch.randn(3, 2, 4) * 1000, torch.zeros(2).half(), torch.ones(2).half()
    x[:, 1] /= 1000
    with use_backend(backend):
        if labels is None:
            G.batch_norm(x, mean, var, training=True)
        else:
            G.conditional_batch_norm(x, labels, mean, var, None, None, True)
    assert mean[0] == 0 and var[0] == 1 and mean[1] != 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_may_be_columns(backend):
    x, table = torch.randn(4, 3, 8, 8), torch.rand(3, 2)
    expected = table.clone()
    with use_backend(backend):
        y = G.batch_norm(x, table[:, 0], table[:, 1])
        torch.testing.assert_close(y, F.batch_norm(x, expected[:, 0], expected[:, 1]))
        G.batch_norm(x, table[:, 0], table[:, 1], training=True)
    F.batch_norm(x, expected[:, 0], expected[:, 1], training=True)
    torch.testing.assert_close(table, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel(backend):
    x, bias = torch.randn(1, 3, 1, 1), torch.tensor([1.0, -2.0, 3.0])
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"one value per channel.*\(1, 3, 1, 1\)"):
            G.batch_norm(x, None, None, training=True)
        y = G.batch_norm(x, None, None, torch.ones(3), bias, training=True, degenerate="beta")
    assert torch.equal(y.flatten(), bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend):
    torch.manual_seed(0)
    x, w, b = leaf(6, 3, 5, 5), leaf(4, 3), leaf(4, 3)
    labels = torch.randint(4, (6,))

    def run():
        y = G.conditional_batch_norm(x, labels, None, None, w, b, True, activation="silu")
        return [y, *torch.autograd.grad(y.square().sum(), [x, w, b])]

    with use_backend(backend):
        assert all(torch.equal(p, q) for p, q in zip(run(), run(), strict=True))


def test_threads_add_a_table_up_in_one_order():
    """64 x 512 sums are enough for several threads."""
    torch.manual_seed(0)
    x, w, labels = leaf(64, 512, 2, 2), leaf(4, 512), torch.randint(4, (64,))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        y = G.conditional_batch_norm(x, labels, None, None, w, w, True)
        first, *others = [
            torch.autograd.grad(y, w, torch.ones_like(y), retain_graph=True)[0] for _ in range(20)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, w, b = leaf(0, 3, 5, 5), leaf(4, 3), leaf(4, 3)
    labels = torch.zeros(0, dtype=torch.int64)
    with use_backend(backend):
        y = G.conditional_batch_norm(x, labels, None, None, w, b, True)
        grads = torch.autograd.grad(y.sum(), [x, w, b])
    assert y.shape == x.shape
    assert [float(g.abs().sum()) for g in grads] == [0, 0, 0]


def test_the_kernel_stays_inside_the_table():
    """On a GPU labels are not read before the launch; one outside gives its sample NaN."""
    from gannorm import kernels
    from gannorm.norms.composed import NormSpec

    x, table, labels = torch.randn(4, 3, 5), torch.ones(2, 3), torch.tensor([0, 2, -1, 1])
    y, *_ = kernels.forward(x, table, table, labels, None, None, NormSpec(0, 1e-5))
    assert y.isnan().all((1, 2)).tolist() == [False, True, True, False]
    assert y[[0, 3]].isfinite().all()
