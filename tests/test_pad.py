"""Reflection padding by Triton, interpreted: torch's values and gradients, in either layout."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from gannorm.kernels import pad  # noqa: E402

LAYOUTS = {"planes": torch.contiguous_format, "rows": torch.channels_last}
SHAPES = [((2, 3, 7, 9), (3, 3)), ((1, 8, 12, 13), (1, 1)), ((2, 1, 4, 5), (3, 2)),
          ((3, 5, 2, 6), (1, 0))]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "padding", "dtype"),
    [(*case, torch.float32) for case in SHAPES]
    + [(*SHAPES[0], torch.float64), (*SHAPES[0], torch.bfloat16)],
)
def test_values_and_gradients(shape, padding, dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    rows, columns = padding
    expected = F.pad(x, (columns, columns, rows, rows), mode="reflect")
    got = pad.ReflectionPad.apply(x, padding)
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(expected)
    for each in (dy, dy.contiguous(), dy.contiguous(memory_format=torch.channels_last)):
        (ours,) = torch.autograd.grad(got, x, each, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected.double(), x, each.double(), retain_graph=True)
        limit = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


def test_other_strides_and_second_derivatives():
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)[:, ::2].transpose(2, 3)
    assert torch.equal(pad.forward(x, (1, 2)), F.pad(x, (2, 2, 1, 1), mode="reflect"))
    x = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: pad.ReflectionPad.apply(t, (1, 2)), x)
    assert torch.autograd.gradgradcheck(lambda t: pad.ReflectionPad.apply(t, (1, 2)).pow(3), x)
