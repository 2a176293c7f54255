"""What the table says of each kind of norm, and each verdict on a layer made that way."""

import copy

import pytest
import torch

from gannorm import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    ConditionalInstanceNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm2d,
)
from gannorm.diagnostics.norm_layers import (
    COLUMNS,
    fault,
    gaps,
    input_statistics,
    norm_layers,
    render,
    table,
    values_per_statistic,
)

KINDS = {  # values per statistic of (4, 6, 5, 3)
    "instance": (lambda: InstanceNorm2d(6, affine=True), 15),
    "conditional_instance": (lambda: ConditionalInstanceNorm2d(6, 3), 15),
    "batch": (lambda: BatchNorm2d(6), 60),
    "conditional_batch": (lambda: ConditionalBatchNorm2d(6, 3), 60),
    "group": (lambda: GroupNorm(3, 6), 30),
    "layer": (lambda: LayerNorm2d(6), 90),
}
SHAPE = torch.Size((4, 6, 5, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_values_per_statistic(kind: str):
    make, values = KINDS[kind]
    assert values_per_statistic(make(), SHAPE) == values


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_on_weights(kind: str):
    layer = KINDS[kind][0]()
    assert fault(layer, 2) == ""
    assert fault(layer, 1) == "collapsed: one value per statistic"
    for value, words in (
        (1e-4, "dead weights: 100% below 0.001"),
        (-2e3, "exploding: weight up to 2.0e+03"),
        (float("nan"), "exploding: weight is not finite"),
    ):
        torch.nn.init.constant_(layer.weight, value)
        assert fault(layer) == words
    torch.nn.init.ones_(layer.weight)
    layer.weight.data.view(-1)[0] = 0  # one channel of one class
    assert fault(layer) == ""
    torch.nn.init.constant_(layer.bias, float("inf"))
    assert fault(layer) == "exploding: bias is not finite"


@pytest.mark.parametrize("kind", ["batch", "conditional_batch"])
def test_verdicts_on_running_statistics(kind: str):
    layer = KINDS[kind][0]()
    labels = () if kind == "batch" else (torch.zeros(4, dtype=torch.int64),)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 1
    layer.momentum = 0.0
    layer(x, *labels)
    assert fault(layer) == "running statistics never moved"
    layer.momentum = 0.1
    layer(x, *labels)
    assert fault(layer) == "" and fault(layer, 60, 2.9) == ""
    assert "far from the batch's (3.1)" in fault(layer, 60, 3.1)
    layer.running_var.fill_(float("inf"))
    assert fault(layer) == "exploding: running_var is not finite"


def test_the_gap_is_measured_on_what_comes_in():
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(BatchNorm2d(4, affine=False), BatchNorm2d(4), InstanceNorm2d(4))
    before = copy.deepcopy(net.state_dict())
    with gaps({"N": net}) as found:
        net(x)
    assert found == {}  # training: the batch's own statistics are used
    net.load_state_dict(before)
    net.eval()
    with gaps({"N": net}) as found:
        net(x * torch.e + 1)  # the variance by e^2, the mean by 1/e of a standard deviation
        net(x)  # the first pass counts
    assert set(found) == {"N.0", "N.1"}
    assert found["N.0"] == pytest.approx(2, abs=0.05) == found["N.1"]
    assert all(torch.equal(net.state_dict()[k], before[k]) for k in before)
    with gaps({"N": net}) as found:
        net(x - 5)
    assert found["N.0"] == pytest.approx(5, abs=0.1)
    assert not any(layer._forward_pre_hooks for layer in net)


def test_rows():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), BatchNorm2d(6), InstanceNorm2d(6))
    torch.nn.init.zeros_(net[1].weight)
    net[1].running_mean.copy_(torch.arange(6.0))
    assert list(norm_layers(net)) == ["1", "2"]
    shapes = {"D.1": SHAPE, "D.2": torch.Size((4, 6, 1, 1))}
    rows = table({"D": net, "averaged.D": net}, shapes, {"averaged.D.1": 9.0})
    first, second = rows[:2]
    assert first == (
        "D.1", "BatchNorm2d", "6", "60", "0", "0", "0 to 5", "1", "dead weights: 100% below 0.001",
    )  # fmt: skip
    assert second == (
        "D.2", "InstanceNorm2d", "6", "1", "-", "-", "-", "-", "collapsed: one value per statistic",
    )  # fmt: skip
    torch.nn.init.ones_(net[1].weight)
    rows = table({"D": net, "averaged.D": net}, shapes, {"averaged.D.1": 9.0})
    assert rows[0][-1] == "ok" and "far from the batch's (9.0)" in rows[2][-1]
    lines = render(rows).splitlines()
    assert len(lines) == 5 and all(title in lines[0] for title in COLUMNS)
    assert {line[lines[0].index("kind") :].split()[0] for line in lines[1:]} == {
        "BatchNorm2d", "InstanceNorm2d",
    }  # fmt: skip


def test_input_statistics_are_of_what_a_norm_averages():
    net = torch.nn.Sequential(InstanceNorm2d(6), BatchNorm2d(6), torch.nn.ReLU())
    x = 3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + 1
    with input_statistics({"G": net}) as found:
        net(x)
        net(x + 1)  # the first call counts
    assert set(found) == {"G.0/input_mean", "G.0/input_std"}
    torch.testing.assert_close(found["G.0/input_mean"].view(4, 6), x.mean((2, 3)))
    torch.testing.assert_close(found["G.0/input_std"].view(4, 6), x.std((2, 3)))
    assert not net[0]._forward_pre_hooks
