"""`trainer.grad_accum=N`: N batches are one batch of N times the size."""

import pytest
import torch
from test_loop import config
from test_tasks import SIZES, build, data, parameters

from gannorm.errors import RequestError
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.training import checkpoint
from gannorm.training.loop import train
from gannorm.training.run import Run

CASES = [
    ("cyclegan", "optim.d_steps=2"),
    ("cyclegan", "loss=rpgan"),
    ("resblock_gan", "loss=hinge", "optim.d_steps=2"),
    ("resblock_gan", "loss=rpgan", "norm=conditional_instance"),
]


def halved(step):
    """Each batch as two."""
    return [
        [{name: value[half] for name, value in batch.items()} for batch in each]
        for each in step
        for half in (slice(2), slice(2, 4))
    ]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_parts_train_as_the_whole(case, monkeypatch):
    """The same images, noise and labels; no norm or power iteration that sees a whole batch."""
    model, *more = case
    more += ["model.pool_size=0"] if model == "cyclegan" else ["model.d_spectral_norm=false"]
    more += [] if any("norm=c" in word for word in more) else ["norm=instance"]
    torch.manual_seed(1)
    noise = torch.randn(1000, 4)
    used = [0]

    def drawn(self, count):
        used[0] += count
        return noise[used[0] - count : used[0]]

    monkeypatch.setattr(ClassConditional, "noise", drawn)
    found, steps = [], []
    for parts in (1, 2):
        task = build(model, *more, f"data.batch_size={4 // parts}", f"trainer.grad_accum={parts}")
        if parts == 1:
            steps = [data(task) for _ in range(3)]
        torch.manual_seed(3)  # the labels of the generator's step
        used[0] = 0
        losses = [task.train_step(step if parts == 1 else halved(step)) for step in steps]
        found.append((losses, parameters(task)))
    (whole, weights), (parted, parted_weights) = found
    for a, b in zip(whole, parted, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-10, abs=1e-10), key
    for name, weight in weights.items():
        assert torch.allclose(weight, parted_weights[name], rtol=0, atol=1e-10), name


@pytest.mark.parametrize("model", SIZES)
def test_a_step_takes_as_many_batches(model):
    task = build(model, "optim.d_steps=3", "trainer.grad_accum=2")
    taken = {"G": 0, "D": 0}
    for name, optimizer in task.optimizers.items():
        optimizer.register_step_post_hook(
            lambda *_, name=name: taken.__setitem__(name, taken[name] + 1)
        )
    assert task.batches_per_step == 6 == len(data(task))
    assert Run(task, {}).meter.images_per_step == 6 * 4
    figures = task.train_step(data(task))
    assert taken == {"G": 1, "D": 3} and all(v.isfinite() for v in figures.values())


def test_a_continuation_keeps_its_parts(tmp_path, quick_runs):
    words = "resblock_gan", "trainer.steps=2", "trainer.grad_accum=2"
    train(config(*words), tmp_path)
    more = [*words[:1], "trainer.steps=4", f"resume={tmp_path}"]
    with pytest.raises(RequestError, match=r"trainer.grad_accum=1 \(the run: 2\)"):
        train(config(*more), tmp_path)
    summary = train(config(*more, "trainer.grad_accum=2"), tmp_path)
    assert summary["steps"] == 4


def test_an_older_run_had_one_part(tmp_path):
    old, new = {"trainer": {"steps": 1}}, {"trainer": {"steps": 1, "grad_accum": 2}}
    with pytest.raises(RequestError, match=r"trainer.grad_accum=2 \(the run: 1\)"):
        checkpoint.check_same(old, new, tmp_path)
    new["trainer"]["grad_accum"] = 1
    assert checkpoint.check_same(old, new, tmp_path) == []
