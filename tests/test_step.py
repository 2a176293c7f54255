"""A training step: it follows the plain one, does nothing twice, and waits for no GPU."""

import copy
import random
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import configured
from gannorm.models import convolution, narrow, winograd
from gannorm.models.spectral import SpectralNorm, add_spectral_norm
from gannorm.tasks import build_task
from gannorm.tasks.cyclegan import CycleGAN

STEPS, CPU = 20, torch.device("cpu")
PLAIN = ["trainer.memory_format=contiguous", "norm.backend=torch"]
TRAINED = {
    "cyclegan": ["model.blocks=1", "model.identity_weight=0.5", "data.batch_size=2"],
    "resblock_gan": [
        "model.g_spectral_norm=true",
        "model.g_widths=[32,32,16,16]",
        "model.d_widths=[16,32]",
        "model.d_downsamplings=2",
        "data.batch_size=4",
    ],
}


def built(model, *overrides):
    cfg = configured(f"model={model}", *TRAINED[model], "data.image_size=32", *overrides)
    torch.manual_seed(0)
    return build_task(cfg, CPU, None if model == "cyclegan" else 10)


def data(task):
    """What a step takes: other images of noise each time."""
    cfg, domains = task.cfg.data, 2 if isinstance(task, CycleGAN) else 1
    n, (h, w) = cfg.batch_size, cfg.size
    return [
        [{"image": torch.rand(n, 3, h, w) * 2 - 1, "label": torch.arange(n) % 10}
         for _ in range(domains)]
        for _ in range(task.batches_per_step)
    ]  # fmt: skip


def stepped(task, batches, seed, plain=False):
    """The losses of a step with the same draws; plain: torch's convolutions, a pass for each."""
    random.seed(seed)
    torch.manual_seed(seed)
    with ExitStack() as stack:
        if plain:
            for module in (winograd, narrow):
                stack.enter_context(mock.patch.object(module, "takes", lambda *_: False))
            each = mock.patch.object(CycleGAN, "_passed", lambda _, net, *xs: [net(x) for x in xs])
            stack.enter_context(each)
        with task.norm_backend():
            return {k: float(v) for k, v in task.train_step(batches).items() if "/" not in k}


def difference(one, other):
    return max(abs(one[k] - other[k]) / max(abs(other[k]), 0.1) for k in other)


@pytest.mark.parametrize("model", TRAINED)
def test_each_step_is_the_plain_ones(model):
    """From the state that the plain one has reached: over 20 steps training itself multiplies the
    last digit of float32 by far more (one thread and two differ as much)."""
    fast, plain = built(model), built(model, *PLAIN)
    used = Counter()
    counted = mock.patch.object(
        winograd, "forward", side_effect=lambda *a: used.update(["winograd"]) or forward(*a)
    )
    forward = winograd.forward
    for number in range(STEPS):
        batches = data(plain)
        fast.load_state_dict(copy.deepcopy(plain.state_dict()))
        expected = stepped(plain, batches, number, plain=True)
        with counted:
            got = stepped(fast, batches, number)
        assert difference(got, expected) < 1e-4, (number, got, expected)
    assert used["winograd"] >= STEPS * 2 or not winograd.lanes()  # 0: no compiler


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("model", TRAINED)
def test_losses_follow_the_plain_ones_in_float64(model):
    """Where rounding is small enough to stay so: layouts, passes in one batch."""
    fast, plain = built(model), built(model, *PLAIN)
    for number in range(STEPS):
        batches = data(plain)
        got = stepped(fast, batches, number)
        expected = stepped(plain, batches, number, plain=True)
        assert difference(got, expected) < 1e-4, (number, got, expected)


class Seen(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [[], ["optim.clip_norm=1"], ["trainer.grad_accum=2"]], ids=str)
@pytest.mark.parametrize("model", TRAINED)
def test_nothing_in_a_step_waits_for_a_gpu(model, more):
    """No value is read on the host; an image pool's choices are the host's own. The convolutions
    are those of a step that nobody looks at."""
    pool = ["model.pool_size=0"] if model == "cyclegan" else []
    task = built(model, *pool, *more)
    batches = data(task)
    unseen = mock.patch.object(convolution, "recorded", lambda: False)
    with unseen, Seen() as seen, task.norm_backend():
        losses = task.train_step(batches)
        task.update_averages(3)
    waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal",
               "aten::masked_select", "aten::_unique2")  # fmt: skip
    assert not {name: seen.counts[name] for name in waiting if seen.counts[name]}
    with Seen() as seen:
        float(losses["G" if "G" in losses else "G_A"])
    assert seen.counts["aten::_local_scalar_dense"] == 1  # what is looked for can be found


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # Translation and identity in one; the second generator's with its way back, too.
        (["cyclegan"], {"G_A": 2, "G_B": 1, "D_A": 2, "D_B": 2}),
        (["cyclegan", "norm=batch"], {"G_A": 3, "G_B": 3, "D_A": 3, "D_B": 3}),
        (["cyclegan", "model.dropout=true"], {"G_A": 3, "G_B": 3, "D_A": 3, "D_B": 3}),
        (["resblock_gan"], {"G": 2, "D": 3}),  # rpgan's generator loss looks at real images, too
    ],
    ids=str,
)
def test_only_the_weights_that_a_step_moves_get_gradients(model, expected):
    """Also: each network's passes are as few as depend on each other."""
    task, passes, wanted = built(*model), Counter(), []
    for name, net in task.networks.items():
        net.register_forward_hook(lambda *_, name=name: passes.update([name]))
    for name, optimizer in task.optimizers.items():
        optimizer.register_step_pre_hook(
            lambda *_, name=name: wanted.append(
                (name, {n for n, net in task.networks.items()
                        for p in net.parameters() if p.requires_grad and p.grad is not None})
            )
        )  # fmt: skip
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    task.train_step(data(task))
    found = dict(wanted)
    assert found == {"G": set(task.generators), "D": set(task.discriminators)}
    assert passes == expected


@pytest.mark.parametrize("model", TRAINED)
def test_spectral_norms_move_once_a_step(model):
    task = built(model, "model.d_spectral_norm=true", "loss.gradient_penalty=1", "loss.gan=hinge",
                 "trainer.grad_accum=2")  # fmt: skip
    moves = Counter()
    power = SpectralNorm._power_method

    def counted(self, matrix, count):
        moves[self] += count
        power(self, matrix, count)

    parts = [m for net in task.networks.values() for m in net.modules()
             if isinstance(m, SpectralNorm)]  # fmt: skip
    assert parts
    with mock.patch.object(SpectralNorm, "_power_method", counted):
        task.train_step(data(task))
        task.train_step(data(task))
    assert dict(moves) == dict.fromkeys(parts, 2)


def test_whoever_does_not_move_them_gets_torchs_spectral_norm():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Conv2d(4, 6, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.manual_seed(1)
    add_spectral_norm(ours)
    torch.manual_seed(1)
    spectral_norm(theirs)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        got, expected = (net(x).square().sum() for net in (ours, theirs))
        torch.testing.assert_close(got, expected)
        gradients = (
            torch.autograd.grad(y, list(net.parameters()))
            for y, net in ((got, ours), (expected, theirs))
        )
        torch.testing.assert_close(*gradients)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_an_average_without_memory_is_the_network():
    """ema_decay=0: one set of weights, not two that are made equal in each step."""
    task = built("cyclegan", "optim.ema_decay=0", "norm=batch")
    task.train_step(data(task))
    task.update_averages(1)
    for name, net in task.generators.items():
        averaged = task.averaged[name]
        assert not averaged.training and net.training
        for (key, a), b in zip(
            averaged.state_dict().items(), net.state_dict().values(), strict=True
        ):
            assert a.data_ptr() == b.data_ptr(), key
        assert not any(p.requires_grad for p in averaged.parameters())
    state = copy.deepcopy(task.state_dict())
    other = built("cyclegan", "optim.ema_decay=0", "norm=batch", "seed=1")
    other.load_state_dict(state)
    for name, tensors in state["averaged"].items():
        for key, value in other.averaged[name].state_dict().items():
            assert torch.equal(value, tensors[key])
