"""`trainer.memory_format` and `trainer.precision`: how weights lie, and what float32 is."""

from types import SimpleNamespace

import pytest
import torch
from test_tasks import SIZES, build, data, parameters

from gannorm import parallel
from gannorm.tasks.task import memory_format
from gannorm.training.arithmetic import arithmetic

LAST, PLAIN = torch.channels_last, torch.contiguous_format
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "asked, precision, device, expected",
    [
        ("auto", "fp32", "cpu", LAST),
        ("auto", "bf16", "cpu", LAST),
        ("auto", "fp32", "cuda", PLAIN),
        ("auto", "tf32", "cuda", PLAIN),
        ("auto", "bf16", "cuda", LAST),
        ("auto", "fp16", "cuda", LAST),
        ("contiguous", "bf16", "cuda", PLAIN),
        ("contiguous", "fp32", "cpu", PLAIN),
        ("channels_last", "fp32", "cuda", LAST),
    ],
)
def test_the_layout(asked, precision, device, expected):
    trainer = SimpleNamespace(memory_format=asked, precision=precision)
    assert memory_format(trainer, torch.device(device)) is expected


@pytest.mark.parametrize("model", SIZES)
def test_networks_images_and_gradients_have_it(model):
    for asked, layout in (("channels_last", LAST), ("contiguous", PLAIN)):
        task = build(model, f"trainer.memory_format={asked}")
        seen = []
        net = task.discriminators["D" if model == "resblock_gan" else "D_A"]
        net.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        task.train_step(data(task))
        every = [p for net in (*task.networks.values(), *task.averaged.values())
                 for p in net.parameters() if p.dim() == 4]  # fmt: skip
        every += [state["exp_avg"] for optimizer in task.optimizers.values()
                  for state in optimizer.state.values() if state["exp_avg"].dim() == 4]  # fmt: skip
        assert all(t.is_contiguous(memory_format=layout) for t in every)
        assert any(t.is_contiguous() == (layout is PLAIN) for t in every)
        assert seen[-1].is_contiguous(memory_format=layout)
        assert task.on_device(torch.rand(2, 3, 8, 8)).is_contiguous(memory_format=layout)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("then", ["contiguous", "channels_last"])
def test_a_checkpoint_goes_on_in_the_other_layout(model, then, tmp_path):
    """As in its own: the fused Adam reads its averages in the order of memory."""
    layouts = ["contiguous", "channels_last"]
    first = build(model, f"trainer.memory_format={then}")
    for _ in range(3):
        first.train_step(data(first))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    ends = []
    for layout in layouts:
        task = build(model, f"trainer.memory_format={layout}")
        task.load_state_dict(torch.load(tmp_path / "state.pt"))
        torch.manual_seed(5)
        for _ in range(2):
            task.train_step(data(task))
        ends.append(parameters(task))
    for name, weight in ends[0].items():
        assert torch.allclose(weight, ends[1][name], rtol=0, atol=1e-9), name


def test_gradients_of_several_processes_have_their_weights_layout(monkeypatch):
    task = build("cyclegan", "trainer.memory_format=channels_last")
    monkeypatch.setattr(parallel, "means", lambda grads: [2 * g.contiguous() for g in grads])
    weight = task.generators["G_A"].model[1].weight
    weight.grad = torch.randn(weight.shape)
    expected = 2 * weight.grad
    task._share_gradients([weight])
    assert weight.grad.stride() == weight.stride() and torch.equal(weight.grad, expected)


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("tf32", True), ("bf16", True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_of_a_gpu_is_what_was_asked(precision, allowed, deterministic, monkeypatch):
    # What other tests use of torch.testing forbids to set them.
    frozen = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(frozen, "__allow_nonbracketed_mutation_flag", True)

    def flags():
        backends = torch.backends
        return (
            backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark,
        )  # fmt: skip

    before = flags()
    trainer = SimpleNamespace(precision=precision, deterministic=deterministic)
    with pytest.raises(ZeroDivisionError), arithmetic(trainer, CUDA):
        assert flags() == (allowed, allowed, not deterministic)
        raise ZeroDivisionError
    assert flags() == before
    with arithmetic(trainer, torch.device("cpu")):
        assert flags() == before
