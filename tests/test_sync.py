"""Batch norms over processes equal one process's on the whole batch (see sync_checks.py).

One spawn of three processes runs every check, in the world and in a group of two of them.
"""

import json
import logging

import pytest
import torch
from sync_checks import CHECKS, PROCESSES, RUNS, SLOW, work
from torch import multiprocessing, nn

import gannorm
from gannorm.norms import functional as G
from gannorm.norms import sync


def spawned(folder, slow):
    multiprocessing.spawn(work, (str(folder), slow), PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def passed(results, group, name):
    key = f"{group}, {name}"
    members = [r for k, r in enumerate(results) if group == "world" or k != 1]
    failures = [text for r in results for text in r.values() if text]
    assert [r.get(key) for r in members] == [""] * len(members), "\n".join(failures)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("sync"), slow=False)


@pytest.mark.parametrize("group,name", [run for run in RUNS if run[1] in CHECKS])
def test_processes_together(results, group, name):
    passed(results, group, name)


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("sync"), slow=True)


@pytest.mark.slow
@pytest.mark.parametrize("group,name", [run for run in RUNS if run[1] in SLOW])
def test_processes_together_slowly(slow_results, group, name):
    passed(slow_results, group, name)


def test_without_torch_distributed_a_norm_is_on_its_own():
    x = torch.randn(4, 3, 5)
    expected = G.batch_norm(x, None, None, training=True)
    for group in ("world", "a name that is looked up later"):
        y = G.batch_norm(x, None, None, training=True, process_group=group)
        assert torch.equal(y, expected)
    with pytest.raises(ValueError, match="one value per channel"):
        G.batch_norm(x[:1, :, :1], None, None, training=True, process_group="world")
    with pytest.raises(TypeError, match="process_group=3 is no group"):
        G.batch_norm(x, None, None, training=True, process_group=3)


def test_convert_sync(caplog):
    """Every batch norm of ours shares, what cannot is named, the representation says so."""
    lazy, theirs = nn.LazyBatchNorm2d(), nn.SyncBatchNorm(4)
    made = nn.Sequential(
        nn.BatchNorm1d(4), gannorm.ConditionalBatchNorm2d(4, 2), gannorm.BatchNorm3d(4),
        nn.InstanceNorm2d(4), lazy, theirs,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert gannorm.convert_sync(made) is made
    assert [getattr(m, "process_group", None) for m in made[:5]] == ["world"] * 3 + [None] * 2
    assert type(made[5]) is nn.SyncBatchNorm and type(made[4]) is nn.LazyBatchNorm2d
    assert "leaves 4 as it is" in caplog.text and "leaves 5 as it is" in caplog.text
    assert "process_group=world" in repr(made[1]) and "process_group" not in repr(made[3])
    assert "process_group" not in repr(gannorm.BatchNorm2d(4))
    with pytest.raises(RuntimeError, match=r"gannorm\.convert_sync makes it one of"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(made[1]))


def test_suspended_blocks_nest():
    with sync.suspended():
        with sync.suspended():
            pass
        assert sync._suspended
    with pytest.raises(KeyError), sync.suspended():
        raise KeyError
    assert not sync._suspended
