"""Our convolution: torch's, at every order of derivative."""

import pytest
import torch
from torch import nn

from gannorm.models.convolution import Conv2d, _Convolution

CASES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 4, "stride": 2, "padding": 1},
    "odd stride": {"kernel_size": 3, "stride": 2},  # leaves out the last column
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": (2, 1)},
    "grouped": {"kernel_size": 1, "groups": 2, "bias": False},
    "reflected": {"kernel_size": 5, "padding": (2, 1), "padding_mode": "reflect"},
}


def pair(keywords):
    torch.manual_seed(0)
    ours = Conv2d(4, 6, twice=True, **keywords).double()
    theirs = nn.Conv2d(4, 6, **keywords).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(2, 4, 8, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_penalty_on_the_gradient_has_torchs_gradient(case, channels_last):
    ours, theirs, x = pair(CASES[case])
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def grads(net):
        y = net(x).tanh()
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
        total = y.square().sum() + first.square().sum() + second.square().sum()
        return y, first, second, *torch.autograd.grad(total, [x, *net.parameters()])

    for a, e in zip(grads(ours), grads(theirs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_our_own():
    """torch's would take a convolution with a kernel as large as the feature map."""
    ours, _, x = pair(CASES["plain"])
    (first,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    assert "_InputGradient" in type(first.grad_fn).__name__


def test_complex_numbers_are_torchs():
    net = Conv2d(2, 3, 3, dtype=torch.complex64)
    x = torch.randn(1, 2, 5, 5, dtype=torch.complex64, requires_grad=True)
    (dx,) = torch.autograd.grad(net(x).abs().sum(), x)
    assert dx.shape == x.shape


def test_autocast_compile_and_transforms_take_torchs(monkeypatch):
    ours, theirs, x = pair(CASES["plain"])
    monkeypatch.setattr(_Convolution, "apply", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.float()(x.float()).dtype == torch.bfloat16
    ours.double()
    assert ours.to("meta")(x.to("meta")).shape == (2, 6, 8, 6)
    ours, *_ = pair(CASES["plain"])
    done = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(done, theirs(x))
    torch.testing.assert_close(
        torch.func.jacrev(ours)(x.detach()), torch.func.jacrev(theirs)(x.detach())
    )
