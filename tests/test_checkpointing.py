"""`trainer.checkpointing=true`: the same training in less memory."""

import copy

import pytest
import torch
from test_tasks import SIZES, build, data
from torch.profiler import ProfilerActivity, profile
from torch.utils import checkpoint as torchs

from gannorm.norms.backend import use_backend
from gannorm.tasks import checkpointing
from gannorm.tasks.checkpointing import checkpoint_blocks
from gannorm.training.options import prepare

CASES = [
    ("cyclegan", "model.d_spectral_norm=true", "optim.d_steps=2"),
    ("cyclegan", "norm=batch", "model.dropout=true"),
    ("cyclegan", "loss=wgan_gp", "model.blocks=2"),
    ("resblock_gan", "model.g_spectral_norm=true", "optim.d_steps=2"),
    ("resblock_gan", "loss=hinge", "model.block=postact", "trainer.grad_accum=2"),
    ("resblock_gan", "loss.diffaugment=[color,cutout]"),
]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_it_trains_alike(case):
    """Losses, weights, running statistics, spectral norms' vectors, and what is drawn."""
    found, runs = [], []
    for asked in ("false", "true"):
        task = build(*case, f"trainer.checkpointing={asked}")
        prepare(task)
        torch.manual_seed(3)
        losses = [task.train_step(data(task)) for _ in range(5)]
        states = {
            f"{name}.{key}": value.clone()
            for name, net in task.networks.items() for key, value in net.state_dict().items()
        }  # fmt: skip
        found.append((losses, states, torch.rand(())))
        runs.append(task)
    (losses, states, after), (again, those, after_those) = found
    for a, b in zip(losses, again, strict=True):
        assert all(float(a[key]) == pytest.approx(float(b[key]), abs=1e-10) for key in a)
    assert states.keys() == those.keys() and after == after_those
    for name, value in states.items():
        assert torch.allclose(value, those[name], rtol=0, atol=1e-10), name


@pytest.mark.parametrize("model", SIZES)
def test_blocks_run_twice_while_they_are_differentiated_alone(model):
    runs = []
    task = build(model)
    for net in task.networks.values():
        checkpoint_blocks(net)
    convolutions = [m for net in task.networks.values() for m in net.modules()
                    if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    for module in convolutions:
        module.register_forward_hook(lambda *_: runs.append(1))
    g = next(iter(task.generators.values()))
    inputs = (torch.randn(2, 3, 8, 8),) if model == "cyclegan" else (task.noise(2), torch.arange(2))
    with torch.no_grad():
        g(*inputs)
    once = len(runs)
    g.eval()(*inputs).sum().backward()
    assert len(runs) == 2 * once
    runs.clear()
    g.train()(*inputs).sum().backward()
    assert once < len(runs) <= 2 * once


def test_a_copy_checkpoints_itself():
    net = build("cyclegan").generators["G_A"]
    checkpoint_blocks(net)
    other, x = copy.deepcopy(net), torch.randn(1, 3, 8, 8)
    other(x).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert other.state_dict().keys() == net.state_dict().keys()


def test_the_second_run_has_the_backend_of_the_first():
    """A GPU's backward pass runs in a thread that knows of none."""
    net, seen = build("cyclegan").generators["G_A"], []
    checkpoint_blocks(net)
    net.model[0].register_forward_hook(lambda *_: seen.append(checkpointing.selected()))
    with use_backend("torch"):
        y = net(torch.randn(1, 3, 8, 8)).sum()
    y.backward()
    assert seen == ["torch", "torch"]


def test_numbers_are_kept_where_some_are_drawn_alone(monkeypatch):
    """A CUDA graph cannot put a generator back."""
    asked, plain = [], torchs.checkpoint

    def look(*inputs, **options):
        asked.append(options["preserve_rng_state"])
        return plain(*inputs, **options)

    monkeypatch.setattr(checkpointing, "checkpoint", look)
    for dropout in ("false", "true"):
        net = build("cyclegan", f"model.dropout={dropout}").generators["G_A"]
        checkpoint_blocks(net)
        asked.clear()
        net(torch.randn(1, 3, 8, 8))
        assert any(asked) == (dropout == "true")


def peak(task, taken) -> int:
    """Bytes of a step at its peak, beside what was there before."""
    task.train_step(taken)
    for optimizer in task.optimizers.values():
        optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        task.train_step(taken)
    events = run.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = most = 0
    for _, change in changes:
        total += change
        most = max(most, total)
    return most


@pytest.mark.slow
def test_the_published_cyclegan_takes_half():
    """At 128x128: a step's peak, gradients included."""
    words = [
        "model.width=64", "model.blocks=9", "model.d_width=64", "model.d_layers=3",
        "model.downsamplings=2", "model.identity_weight=0.5", "data.image_size=128",
    ]  # fmt: skip
    images = [[{"image": torch.rand(1, 3, 128, 128) * 2 - 1} for _ in range(2)]]
    found = []
    for asked in ("false", "true"):
        task = build("cyclegan", *words, "data.batch_size=1", f"trainer.checkpointing={asked}")
        prepare(task)
        found.append(peak(task, images))
    assert 0 < found[1] <= 0.5 * found[0]
