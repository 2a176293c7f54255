"""Standing statistics: those of a batch norm's inputs over the batches; nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from gannorm import BatchNorm2d, ConditionalBatchNorm2d, InstanceNorm2d
from gannorm.metrics.standing import renew_statistics


@pytest.mark.parametrize(
    "make", [nn.BatchNorm2d, BatchNorm2d, lambda c: ConditionalBatchNorm2d(c, 2)]
)
def test_they_are_the_average_over_the_batches(make):
    norm = make(3).eval()
    torch.manual_seed(0)
    norm.running_mean.fill_(9.0)
    batches = [torch.randn(4, 3, 5, 5) * s + s for s in (1.0, 2.0, 4.0)]
    labels = [torch.tensor([0, 1, 1, 0])] if isinstance(norm, ConditionalBatchNorm2d) else []
    renew_statistics(norm, [lambda x=x: norm(x, *labels) for x in batches])
    means = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-5)
    assert torch.allclose(norm.running_var, variances, rtol=1e-5)
    assert norm.momentum == 0.1 and not norm.training


def test_only_the_norms_train_while_they_are_taken():
    net = nn.Sequential(nn.Dropout(0.5), BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    seen = []
    x = torch.ones(2, 3, 4, 4) + torch.randn(2, 3, 4, 4)
    weights = copy.deepcopy(net[2].state_dict())

    def forward() -> None:
        seen.append([m.training for m in net])
        net(x)

    renew_statistics(net, [forward])
    assert seen == [[False, True, False]] and not any(m.training for m in net)
    assert torch.allclose(net[1].running_mean, x.mean((0, 2, 3)), atol=1e-6)  # nothing dropped
    assert all(torch.equal(v, net[2].state_dict()[k]) for k, v in weights.items())


def test_nothing_to_renew():
    called = []
    renew_statistics(InstanceNorm2d(3), [lambda: called.append(1)])
    assert not called
    norm = BatchNorm2d(3).eval()
    norm.running_mean.fill_(2.0)
    renew_statistics(norm, [])
    assert torch.equal(norm.running_mean, torch.full((3,), 2.0))
