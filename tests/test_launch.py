"""Every plan gives the same norms: persistent or split, in either layout, masked or not."""

import pytest
import torch
from pairs import pairs
from parity import close, epilogue, leaf
from torch.nn import functional as F

from gannorm import use_backend
from gannorm.kernels import launch
from gannorm.kernels.launch import plan
from gannorm.kernels.runner import Kernel
from gannorm.norms import functional as G

# PERSISTENT, TILE, WAVES, GRID and STAGES that make a plan of each kind out of small shapes.
KINDS = {
    "persistent": (launch.PERSISTENT, launch.TILE, launch.WAVES, launch.GRID, 0),
    "split planes": (0, 1024, launch.WAVES, launch.GRID, 0),
    "split elements": (0, 128, launch.WAVES, launch.GRID, 0),
    "chunks of several tiles": (0, 256, 1, launch.GRID, 0),
    "elements of several planes": (0, 128, 1, 1, 0),
    "looped planes": (0, 1024, launch.WAVES, launch.GRID, 2),
    "looped elements": (0, 128, launch.WAVES, launch.GRID, 1),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
}
SHAPES = [(3, 6, 3, 5), (3, 4, 4, 4), (2, 2, 1, 37)]
FUSED = {"activation": "leaky_relu", "residual": True}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    for name, value in zip(
        ("PERSISTENT", "TILE", "WAVES", "GRID", "STAGES"), KINDS[request.param], strict=True
    ):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(launch, "_processors", lambda device: 2)
    monkeypatch.setattr(launch, "LOOPED", launch.TILE)
    monkeypatch.setattr(launch, "ENOUGH", 0.0)
    launch.forget()
    with use_backend("triton"):
        yield request.param
    monkeypatch.undo()
    launch.forget()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shape,layout,e", pairs(SHAPES, LAYOUTS, [{}, FUSED]), ids=str)
def test_every_plan_of_every_norm(kind, layout, shape, e):
    torch.manual_seed(0)
    n, c = shape[:2]
    w, b = leaf(3, c), leaf(3, c)
    labels = torch.randint(3, (n,))
    rows = [t[labels][:, :, None, None] for t in (w, b)]
    x = LAYOUTS[layout](torch.randn(shape).double() + 2).requires_grad_()
    r = torch.randn(shape).double().requires_grad_() if e.get("residual") else None
    leaves = [x, w, b] + ([] if r is None else [r])
    ops = {
        "instance": (
            lambda k: G.instance_norm(x, weight=w[0], bias=b[0], **k),
            lambda: F.instance_norm(x, weight=w[0], bias=b[0]),
        ),
        "group": (
            lambda k: G.group_norm(x, 2, w[1], b[1], **k),
            lambda: F.group_norm(x, 2, w[1], b[1]),
        ),
        "batch": (
            lambda k: G.conditional_batch_norm(x, labels, None, None, w, b, True, **k),
            lambda: F.batch_norm(x, None, None, training=True) * rows[0] + rows[1],
        ),
        "evaluation": (
            lambda k: G.batch_norm(x, b[0].detach(), w[1].detach().exp(), w[0], b[0], **k),
            lambda: F.batch_norm(x, b[0].detach(), w[1].detach().exp(), w[0], b[0]),
        ),
    }
    for ours, theirs in ops.values():
        y, expected = ours({**e, "residual": r}), epilogue(theirs(), r, e)
        close(y, expected, 1e-10)
        if layout == "channels_last":
            assert y.is_contiguous(memory_format=torch.channels_last)
        dy = torch.randn(shape).double()
        grads = [torch.autograd.grad(t, leaves, dy) for t in (y, expected)]
        for a, g in zip(*grads, strict=True):
            close(a, g, 1e-10)


def test_running_statistics_move_in_the_kernel(kind):
    """float32, where the kernels move them; a non-finite channel's stay."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5, 5)
    ours = [torch.randn(3), torch.rand(3)]
    theirs = [t.clone() for t in ours]
    G.batch_norm(x, *ours, training=True, momentum=0.3)
    F.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs)
    x[2, 1, 0, 0] = torch.nan
    G.batch_norm(x, *ours, training=True, momentum=0.3)
    F.batch_norm(x, *theirs, training=True, momentum=0.3)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]])


def test_magnitudes(kind):
    """Squares beyond float32, and unit variance far from 0, in every plan."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7)
    x[:, 1] *= 1e30
    x[:, 2] += 1e6
    for norm in (
        lambda t: G.instance_norm(t),
        lambda t: G.batch_norm(t, None, None, training=True),
    ):
        with use_backend("torch"):
            expected = norm(x.double())
        close(norm(x).double(), expected, 2e-6)


PUBLISHED = [
    *((False, 8, 1, c, s * s) for c, s in ((64, 256), (128, 128), (256, 64))),
    *((True, 64, 64, c, s * s) for c, s in ((1024, 4), (512, 8), (256, 16), (128, 32), (64, 64))),
    (False, 32, 8, 32, 56 * 56),
    *((False, 1, 1, 64, s * s) for s in (32, 64, 128, 256, 512, 1024)),
    (False, 4096, 768, 1, 1),
]


@pytest.mark.parametrize(
    "case", [(70000, 70000, 3, 5120, False), (70000, 70000, 64, 81, True)], ids=str
)
def test_many_samples_fit_the_grid(case):
    p = plan(True, *case[:4], 4, case[4])
    assert p.chunks <= 65535 and p.chunks * p.loops * p.block_p * p.block_s >= case[1] * case[3]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_plans(case, itemsize, last):
    """The blocks cover every set, within the bounds, in at most a few programs a processor."""
    batch, samples, planes, sets, size = case
    p = plan(batch, samples, planes, sets, size, itemsize, last)
    elements = p.block_p * p.block_g * p.block_s
    assert elements * itemsize <= (
        launch.PERSISTENT if p.persistent else launch.LOOPED if p.stages else launch.TILE
    )
    assert elements * itemsize <= p.warps * 32 * 128  # bytes of a thread's registers
    assert p.blocks >= sets / p.block_g * (1 if batch else samples)
    if p.persistent:
        assert p.block_p >= planes and p.block_s >= size
    elif p.stages:  # the program's loop covers its sets
        assert p.chunks == 1
    elif p.block_s < size:
        assert p.chunks * p.loops * p.block_p * p.block_s >= planes * size
    else:
        assert p.chunks * p.loops * p.block_p >= planes
    persistent = planes * size * itemsize <= launch.formula(batch).persistent
    assert (
        p.persistent == persistent
        or last
        or not (planes & (planes - 1) == 0 and size & (size - 1) == 0)
    )
    if not p.persistent and not p.stages:
        few = p.blocks * p.chunks <= 2.5 * launch.WAVES * 132
        assert few or p.loops in (1, -(-size // p.block_s))  # a chunk stays in its plane


def test_momentum_is_never_a_compiled_constant(kind, monkeypatch):
    """Triton makes an integer 1 a constant, and the remembered kernel serves every momentum."""
    floats = []
    launched = Kernel.__call__

    def watched(kernel, pointers, *factors):
        floats.extend(factors)
        launched(kernel, pointers, *factors)

    monkeypatch.setattr(Kernel, "__call__", watched)
    G.batch_norm(torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3), training=True, momentum=1)
    assert floats
    assert all(type(value) is float for pair in floats for value in pair)
