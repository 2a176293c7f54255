"""Data workers that stall, die or find what is no number: real processes, one line each."""

import math
import multiprocessing
import os
import re
import signal
import time

import pytest
import torch
from test_loop import config

from gannorm.data import batches
from gannorm.data.digits import _Tensors
from gannorm.errors import RequestError, RunError
from gannorm.training import loop
from gannorm.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_runs")


class Slow(_Tensors):
    """Numbers, of which one takes a minute, or its process's life."""

    def __init__(self, at: int, does) -> None:
        super().__init__(torch.zeros(40, 3, 8, 8), torch.zeros(40, dtype=torch.int64))
        self.at, self.does = at, does

    def name(self, i: int) -> str:
        return f"slow/{i}.png"

    def fetch(self, index, generator):
        if self.at in index:
            self.does()
        return super().fetch(index, generator)


def minute() -> None:
    time.sleep(60)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def taken(source, seconds: float, **options) -> str:
    """What the error says, within `seconds`; no worker is left."""
    began = time.monotonic()
    with (
        pytest.raises(RunError) as error,
        batches([source], batch_size=4, start=0, stop=10, seed=0, **options) as loader,
    ):
        for _ in loader:
            pass
    assert time.monotonic() - began < seconds
    assert not multiprocessing.active_children()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_stalled_worker_is_named():
    said = taken(Slow(7, minute), 8, num_workers=2, timeout=0.5)
    found = re.match(
        r"worker [01] of data.num_workers=2 \(process \d+\) has given no batch for "
        r"data.worker_timeout=0.5 seconds; it was at batch (\d+): Slow (.*); look at",
        said,
    )
    assert found and int(found[1]) < 10
    named = re.findall(r"slow/(\d+)\.png", found[2])
    assert len(named) == 4 and "7" in named


def test_stalled_workers_end_together():
    began = time.monotonic()
    taken(Slow(7, minute), 8, num_workers=3, timeout=0.5)
    assert time.monotonic() - began < 5  # torch waits ten seconds for each of them


def test_a_dead_worker_is_named():
    said = taken(Slow(7, killed), 8, num_workers=2)
    assert re.match(
        r"worker [01] of data.num_workers=2 \(process \d+\) was killed by SIGKILL", said
    )
    assert "slow/7.png" in said and "smaller data.num_workers" in said


def test_a_worker_may_die_while_the_run_trains(tmp_path):
    """Told by torch wherever the process is; the run's last checkpoint stays."""
    step = loop.Run.__dict__["evaluate"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=r"worker . of data"):

        def evaluate(self, evaluator):
            for child in multiprocessing.active_children():
                child.kill()
            time.sleep(0.5)
            return step(self, evaluator)

        patch.setattr(loop.Run, "evaluate", evaluate)
        more = ["data.num_workers=2", "trainer.eval_every=4", "trainer.checkpoint_every=3"]
        train(config("resblock_gan", *more, "trainer.steps=8"), tmp_path)
    assert (tmp_path / "checkpoints" / "step_00000003.pt").exists()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_an_image_that_is_no_number_is_named(workers, wrong):
    source = Slow(-1, None)
    source.images[17, 1, 2, 3] = wrong
    with (
        pytest.raises(RequestError, match=r"image slow/17.png of 40 in Slow holds NaN or inf"),
        batches([source], batch_size=4, start=0, stop=10, seed=0, num_workers=workers) as loader,
    ):
        for _ in loader:
            pass


def test_it_is_found_before_the_first_step(tmp_path, monkeypatch):
    """Where the reference's figures look at all images; by its number, where it has no name."""
    build = loop.build_data

    def spoilt(cfg):
        data = build(cfg)
        data.real[0].images[11, 0, 0, 0] = math.nan
        return data

    monkeypatch.setattr(loop, "build_data", spoilt)
    with pytest.raises(RequestError, match=r"image number 11 of 240 in _Tensors holds NaN"):
        train(config("resblock_gan", "trainer.steps=2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
