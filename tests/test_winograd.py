"""3x3 convolutions by Winograd's filtering: torch's values and gradients, at every order."""

import copy
import itertools
import os
import platform
import shlex
import subprocess

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gannorm.models import narrow, winograd
from gannorm.models.convolution import Conv2d
from gannorm.models.winograd import Around
from gannorm.norms.cpu import build

compiled = pytest.mark.skipif(not winograd.lanes(), reason="no compiler")
LAST = torch.channels_last
# Batch, input and output channels, height, width: sides that tiles of 4 divide, and not; panels of
# columns that are not full; more tiles than are worked on at once.
SHAPES = [(2, 32, 48, 12, 10), (1, 16, 16, 7, 9), (3, 64, 80, 8, 8), (2, 16, 32, 2, 3)]
MANY_TILES = (5, 256, 64, 26, 34)
AROUND = [Around(*flags) for flags in itertools.product((False, True), repeat=4)]


class Labelled(torch.Tensor):
    pass


def layer(c, k, around, **keywords):
    return Conv2d(
        c, k, 3, padding=1, padding_mode="reflect" if around.reflect else "zeros",
        upsample=around.upsample, relu=around.relu, pool=around.pool, twice=True, **keywords,
    )  # fmt: skip


def images(n, c, h, w):
    return torch.randn(n, c, h, w).to(memory_format=LAST)


def derivatives(net, x):
    """The output, a penalty's gradient, and the gradients of first and second order."""
    x = x.detach().requires_grad_()
    y = net(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    penalized = y.square().mean() + first.square().mean()
    plain = torch.autograd.grad((y.detach() * net(x)).sum(), [x, *net.parameters()])
    return y, first, *plain, *torch.autograd.grad(penalized, [x, *net.parameters()])


def assert_close(got, expected, limit=1e-4):
    """Largest errors, by the root of the expected values' mean square."""
    for a, e in zip(got, expected, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).abs().max() <= limit * e.square().mean().sqrt()


@compiled
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("shape", "around"),
    [*itertools.product(SHAPES, AROUND), (MANY_TILES, AROUND[0]), (MANY_TILES, AROUND[-1])],
)
def test_values_and_gradients_are_those_of_float64(shape, around):
    n, c, k, h, w = shape
    if around.pool and not around.upsample and (h % 2 or w % 2):
        h, w = h + h % 2, w + w % 2
    torch.manual_seed(0)
    net, x = layer(c, k, around), images(n, c, h, w)
    assert winograd.takes(x, net.weight, net.bias, around)
    got = derivatives(net, x)
    assert got[0].is_contiguous(memory_format=LAST)
    with torch.no_grad():
        assert torch.equal(net(x), got[0])
    assert_close(got, derivatives(copy.deepcopy(net).double(), x.double()))


@compiled
def test_errors_are_a_few_times_a_direct_convolutions():
    torch.manual_seed(0)
    x, net = images(2, 256, 32, 32), nn.Conv2d(256, 256, 3, padding=1, bias=False)
    weight = net.weight.detach()
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    ours = winograd.forward(x, weight, None, Around()).double() - expected
    direct = F.conv2d(x, weight, padding=1).double() - expected
    assert ours.std() <= 10 * direct.std() and ours.std() <= 2e-6 * expected.std()


@compiled
def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    net, x, found = layer(64, 48, Around(reflect=True)), images(3, 64, 20, 20), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(net, x))
    finally:
        torch.set_num_threads(before)
    for got in found[1:]:
        assert all(torch.equal(a, e) for a, e in zip(got, found[0], strict=True))


@compiled
def test_what_is_not_finite_stays_in_its_sample():
    net, x = layer(16, 16, Around(relu=True)), images(2, 16, 8, 8)
    clean = net(x).detach()
    x[1, 3, 2, 2] = float("nan")
    y = net(x).detach()
    assert torch.equal(y[0], clean[0]) and y[1].isnan().any()


@compiled
@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.bfloat16(), w.bfloat16()),
        lambda x, w: (x.contiguous(), w),
        lambda x, w: (x[:, :8].contiguous(memory_format=LAST), w[:, :8]),
        lambda x, w: (x, w[:3]),
        lambda x, w: (x, w[:, :, :1, :1]),
        lambda x, w: (x[:0], w),
        lambda x, w: (x[:, :, :1], w),
        lambda x, w: (x[0], w),
        lambda x, w: (x, w.to("meta")),
        lambda x, w: (x, w.as_subclass(Labelled)),
    ],
)
def test_everything_else_is_torchs(change):
    x, weight = images(2, 16, 8, 8), torch.randn(16, 16, 3, 3)
    assert winograd.takes(x, weight, None, Around())
    x, weight = change(x, weight)
    assert not winograd.takes(x, weight, None, Around())


COMPILER = shlex.split(os.environ.get("CC", "cc"))


@compiled
@pytest.mark.parametrize("flag,lanes", [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_narrower_vectors_give_the_same(flag, lanes, tmp_path, monkeypatch):
    """As the compiler makes them for another processor."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86")
    torch.manual_seed(0)
    net, x = layer(64, 48, Around(True, True, True, True)), images(2, 64, 10, 12)
    source = build.Source(
        winograd.SOURCE.files, (*winograd.SOURCE.flags, flag), winograd.COUNTS, "convolutions"
    )
    build.compile_to(tmp_path / "narrow.so", COMPILER, source)
    loaded = build.load(tmp_path / "narrow.so")
    assert loaded is not None and loaded.conv_lanes() <= lanes
    monkeypatch.setattr(build, "compiled", lambda _: loaded)
    assert_close(derivatives(net, x), derivatives(copy.deepcopy(net).double(), x.double()))


@compiled
def test_another_layout_does_not_compile(tmp_path):
    for field in ("INTEGERS", "ADDRESSES"):
        counts = {**winograd.COUNTS, field: winograd.COUNTS[field] + 1}
        source = build.Source(winograd.SOURCE.files, winograd.SOURCE.flags, counts, "")
        assert build.compiled_path(COMPILER, source) != build.compiled_path(
            COMPILER, winograd.SOURCE
        )
        with pytest.raises(subprocess.CalledProcessError) as caught:
            build.compile_to(tmp_path / "x.so", COMPILER, source)
        assert field.lower() in caught.value.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_torchs_defaults_change_nothing(dtype):
    torch.manual_seed(0)
    net, few, x = layer(16, 16, Around()), Conv2d(16, 3, 3, padding=1), images(1, 16, 8, 8)
    expected = net(x), few(x)
    winograd._kept.__dict__.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = net(x), few(x)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


def test_any_bias():
    """Strided ones and those of another kind, which a functional call can give."""
    torch.manual_seed(0)
    net, x = layer(16, 16, Around()), images(1, 16, 8, 8)
    for bias in (torch.randn(32)[::2], torch.ones(1).expand(16)):
        got = torch.func.functional_call(net, {"bias": bias}, x)
        torch.testing.assert_close(
            got, F.conv2d(x, net.weight, bias, padding=1), rtol=1e-4, atol=1e-4
        )
    for bias in (torch.randn(3), torch.randn(16, dtype=torch.float64)):
        with pytest.raises(RuntimeError):
            torch.func.functional_call(net, {"bias": bias}, x)


def test_gradients_as_they_come():
    """Negated views, an expanded one, several at once, and inside of autocast."""
    torch.manual_seed(0)
    for net in (layer(16, 16, Around(True, True, True, True)), Conv2d(3, 16, 3, padding=1)):
        x = images(2, net.in_channels, 8, 8).requires_grad_()
        y, exact = net(x), copy.deepcopy(net).double()(x.double())
        inputs = [x, *net.parameters()]
        for dy in (torch._neg_view(torch.randn_like(y)), torch.ones(()).expand_as(y)):
            with torch.autocast("cpu", torch.bfloat16):
                got = torch.autograd.grad(y, x, dy, retain_graph=True)
            assert_close(got, torch.autograd.grad(exact, x, dy.double(), retain_graph=True))
        many = torch.randn(3, *y.shape)
        got = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in many]
        assert_close(got, [torch.stack(g).double() for g in zip(*each, strict=True)])


def test_a_leaf_of_a_traced_graph():
    net = nn.Sequential(layer(16, 16, Around(relu=True)), nn.Tanh())
    x = images(1, 16, 8, 8)
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert torch.equal(traced(x), net(x))


@pytest.mark.parametrize("keywords", [{"padding": "same"}, {"padding_mode": "circular"}])
def test_other_paddings_are_refused(keywords):
    with pytest.raises(ValueError, match="padding"):
        Conv2d(4, 4, 3, **keywords)


@pytest.mark.parametrize("c,k", [(16, 3), (3, 16), (3, 1), (1, 4)])
@pytest.mark.parametrize("kernel,padding", [(7, 3), (3, 1), (3, 0), (4, 2)])
def test_few_channels_four_rows_at_once(c, k, kernel, padding):
    torch.manual_seed(0)
    net = Conv2d(c, k, kernel, padding=padding, twice=True)
    height = 12 + kernel - 1 - 2 * padding
    x = images(2, c, height, 9)
    assert narrow.takes(x, net.weight, padding, k) == (k <= narrow.FEW)
    assert_close(derivatives(net, x), derivatives(copy.deepcopy(net).double(), x.double()), 1e-5)


def test_few_channels_need_rows_by_four():
    weight = torch.randn(3, 16, 3, 3)
    assert narrow.takes(images(1, 16, 8, 5), weight, 1, 3)
    assert not narrow.takes(images(1, 16, 9, 5), weight, 1, 3)
    assert not narrow.takes(images(1, 16, 8, 5), weight[:, :, :1, :1], 0, 3)
