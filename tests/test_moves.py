"""The kernels move no more bytes than their plan says; counted in Triton's interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks.cases import Case
from benchmarks.moves import count_moves, counting
from gannorm.kernels import launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counted in the interpreter"
)

EPILOGUES = ("none", "leaky_relu", "residual", "residual+relu")
PERSISTENT = [  # sets of up to 16K elements, 8K across the batch: read once
    ("instance", (1, 2, 32, 32), 0),
    ("instance", (1, 2, 64, 64), 0),
    ("instance", (1, 2, 128, 128), 0),
    ("conditional_batch", (8, 4, 32, 32), 0),
    ("group", (1, 8, 32, 32), 2),
]
SPLIT = [  # larger ones: read for the statistics, and again to be normalized
    ("instance", (1, 2, 256, 256), 0),
    ("conditional_batch", (16, 2, 64, 64), 0),
    ("group", (1, 16, 56, 56), 2),
]
SLACK = 1.02  # statistics, affine rows, labels, sums and the table's gradient


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("op", "shape", "groups"), PERSISTENT)
def test_persistent_sets_move_the_floor(op, shape, groups, epilogue):
    case = Case(op, shape, epilogue, groups=groups)
    moves = count_moves(case)
    assert case.floor("forward") <= moves.forward <= SLACK * case.floor("forward")
    assert case.floor("backward") <= moves.backward <= SLACK * case.floor("backward")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("epilogue", ["none", "residual+relu"])
@pytest.mark.parametrize(
    ("op", "shape", "groups", "layout"),
    [(*case, "nchw") for case in SPLIT] + [(*case, "channels_last") for case in PERSISTENT + SPLIT],
)
@pytest.mark.parametrize("looped", [False, True])
def test_larger_sets_are_read_twice_at_most(
    op, shape, groups, layout, epilogue, looped, monkeypatch
):
    if looped:
        monkeypatch.setattr(launch, "ENOUGH", 0.0)
        launch.forget()
    case = Case(op, shape, epilogue, "fp32", layout, groups)
    inner = epilogue == "residual+relu"  # it is read for the activation's slope
    moves = count_moves(case)
    assert moves.forward <= SLACK * (3 + case.has_residual)
    assert moves.backward <= SLACK * (5 + 3 * inner)
    assert not looped or moves.forward_kernels == 1
    launch.forget()


def test_the_floor_of_each_epilogue():
    floors = {
        e: (Case("instance", (1, 1, 2, 2), e).floor("forward"),
            Case("instance", (1, 1, 2, 2), e).floor("backward"))
        for e in EPILOGUES
    }  # fmt: skip
    assert floors == {
        "none": (2, 3), "leaky_relu": (2, 3), "residual": (3, 3), "residual+relu": (3, 5),
    }  # fmt: skip


@triton.jit
def _copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    first = tl.load(x_ptr)
    x = tl.load(x_ptr + i, mask=i < size, other=0)
    tl.store(y_ptr + i, x + first, mask=i < size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_only_live_lanes_count(dtype):
    x = torch.ones(50, dtype=dtype)
    y = torch.empty_like(x)
    with counting() as total:
        _copy_kernel[(1,)](x, y, 37, BLOCK=64)
    assert total == [(1 + 37 + 37) * x.element_size(), 1]
    _copy_kernel[(1,)](x, y, 37, BLOCK=64)
    assert total == [(1 + 37 + 37) * x.element_size(), 1], "counted behind the block"
    assert (y[:37] == 2).all()


def test_torch_operations_count_and_views_do_not():
    x = torch.ones(4, 6)
    for operation, moved in (
        (lambda: x + 1, 48),
        (lambda: x.view(-1).reshape(6, 4)[:, 1:].t(), 0),
        (lambda: x.t().contiguous(), 48),
        (lambda: torch.empty_like(x), 0),
        (lambda: torch.zeros_like(x), 24),
        (lambda: x.new_zeros(5), 5),
        (lambda: x.mul_(2), 48),
        (lambda: torch.empty(4, 6).copy_(x[:, :1].expand(4, 6)), 4 + 24),
        (lambda: x.sum(), 25),
    ):
        with counting() as total:
            operation()
        assert total == [4 * moved, 0]
