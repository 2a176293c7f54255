"""`trainer.deterministic=true`: two processes, the same bits; what cannot is named."""

import os
import subprocess
import sys

import pytest
import torch
from test_loop import MODELS, ROOT, TINY, config, equal, weights
from torch import nn
from torch.testing import assert_close

from gannorm.errors import RequestError
from gannorm.models.fixed_order import pooled, reflected
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.training.determinism import WORKSPACE, _fix_workspace, deterministic
from gannorm.training.loop import train

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_the_same_bits(model, tmp_path):
    """Each with two threads."""
    words = [*MODELS[model], *TINY, "trainer.steps=4", "trainer.deterministic=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    for name in ("a", "b"):
        command = [sys.executable, "train.py", *words, f"hydra.run.dir={tmp_path / name}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_torch_is_asked_inside_alone(tmp_path, quick_runs, monkeypatch):
    step, seen = ClassConditional.train_step, []

    def look(self, taken):
        seen.append(torch.are_deterministic_algorithms_enabled())
        if len(seen) == 4:  # what torch says on a GPU
            raise RuntimeError("some_backward_cuda does not have a deterministic implementation, b")
        return step(self, taken)

    monkeypatch.setattr(ClassConditional, "train_step", look)
    train(config("resblock_gan", "trainer.steps=1"), tmp_path / "without")
    asked = "trainer.deterministic=true"
    train(config("resblock_gan", "trainer.steps=1", asked), tmp_path / "with")
    assert seen == [False, True] and not torch.are_deterministic_algorithms_enabled()
    equal(weights(tmp_path / "without")["task"], weights(tmp_path / "with")["task"])
    with pytest.raises(RequestError, match="true: some_backward_cuda has no deterministic"):
        train(config("resblock_gan", "trainer.steps=9", asked), tmp_path / "refused")
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_is_named():
    """A real one, where torch has one on a CPU."""
    with pytest.raises(RequestError, match=r"put_ has no deterministic implementation on cpu"):
        with deterministic(True, CPU):
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="other"), deterministic(True, CPU):
        raise RuntimeError("other")


def test_what_cublas_was_told_is_kept_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delenv(WORKSPACE, raising=False)
    _fix_workspace()
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    _fix_workspace()
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(RequestError, match=rf"is :0:0; export {WORKSPACE}=:4096:8"):
        _fix_workspace()
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RequestError, match="CUDA has begun"):
        _fix_workspace()


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (3, 3, 3, 3), (2, 0, 1, 4)])
def test_a_reflection_in_fixed_order_is_torchs(padding):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = reflected(x, padding), nn.ReflectionPad2d(padding)(x)
    assert torch.equal(ours, theirs)
    ahead = torch.randn_like(ours)
    assert_close(*(torch.autograd.grad(y, x, ahead)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (4, 12), (3, 2)])
def test_a_pool_in_fixed_order_is_torchs(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = pooled(x, 4), nn.AdaptiveAvgPool2d(4)(x)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ahead = torch.randn_like(ours)
    grads = [torch.autograd.grad(y, x, ahead)[0] for y in (ours, theirs)]
    assert_close(*grads, rtol=1e-6, atol=1e-6)
