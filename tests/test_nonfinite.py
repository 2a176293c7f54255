"""A loss that is no number, for real: stop, skip the step, or rewind to the last checkpoint."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import config, equal, lines, losses, weights

from gannorm.tasks.class_conditional import ClassConditional
from gannorm.tasks.cyclegan import CycleGAN
from gannorm.tasks.losses import ImagePool
from gannorm.training import checkpoint
from gannorm.training.loop import train
from gannorm.training.run import Meter, Run

pytestmark = pytest.mark.usefixtures("quick_runs")
TASKS = {"cyclegan": CycleGAN, "resblock_gan": ClassConditional}


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(model, calls): in these calls of its train_step the images are NaN."""

    def poison(model: str, *calls: int) -> list[int]:
        step, seen = TASKS[model].train_step, []

        def wrong(self, taken):
            seen.append(1)
            if len(seen) in calls:
                taken = [
                    [{**b, "image": torch.full_like(b["image"], math.nan)} for b in each]
                    for each in taken
                ]
            return step(self, taken)

        monkeypatch.setattr(TASKS[model], "train_step", wrong)
        return seen

    return poison


@pytest.mark.parametrize("model", TASKS)
def test_steps_are_skipped_and_counted(model, poisoned, tmp_path, capsys):
    """The weights of a step that is skipped stay; the others' losses are averaged."""
    poisoned(model, 3, 4)
    few = ["trainer.steps=6", "trainer.log_every=3", "trainer.on_nonfinite=skip"]
    summary = train(config(model, *few, "trainer.checkpoint_every=1"), tmp_path)
    assert summary["skipped_steps"] == 2 and summary["rewinds"] == 0
    found = losses(tmp_path)
    assert [found[step]["health/skipped_steps"] for step in (3, 6)] == [1, 2]
    for step in (3, 6):
        assert all(math.isfinite(v) for v in found[step].values() if isinstance(v, float))
    said = capsys.readouterr().out
    assert said.count("1 of the last 3 steps skipped") == 2
    state = weights(tmp_path)["task"]
    for image in [pool["images"] for pool in state.get("pools", {}).values()]:
        assert image.isfinite().all()


def test_a_skipped_step_changes_no_weight(poisoned, tmp_path):
    poisoned("resblock_gan", 2)
    skip = ["trainer.on_nonfinite=skip", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=9"]
    train(config("resblock_gan", "trainer.steps=3", *skip), tmp_path)
    states = [
        torch.load(tmp_path / "checkpoints" / f"step_{k:08d}.pt")["task"]["networks"]
        for k in (1, 2, 3)
    ]
    same = [
        torch.equal(states[k]["G"]["linear.weight"], states[k + 1]["G"]["linear.weight"])
        for k in (0, 1)
    ]
    assert same == [True, False]


def test_too_many_skipped_in_a_row_stop_the_run(poisoned, tmp_path):
    seen = poisoned("resblock_gan", 2, *range(4, 100))
    few = ["trainer.steps=50", "trainer.on_nonfinite=skip", "trainer.nonfinite_limit=5"]
    with pytest.raises(FloatingPointError, match=r"6 steps in a row up to step 9 .*first in"):
        train(config("resblock_gan", *few, "trainer.log_every=3"), tmp_path)
    assert len(seen) == 9 + 1  # run again to see where
    assert lines(tmp_path)[-1]["health/not_finite"] == 1.0


def test_skipped_steps_of_a_meter():
    """Means over the steps that are left, whatever the other figures of a skipped one."""
    from gannorm.training.nonfinite import Skips

    meter = Meter(1, Skips(lambda name: "/" not in name))
    for a, b in ((1.0, 2.0), (math.nan, 4.0), (3.0, 6.0), (1.0, math.inf)):
        meter.add({"a": torch.tensor(a), "x/b": torch.tensor(b)}, 1.0)
    figures = meter.read()
    assert (meter.skipped, meter.row) == (1, 0)
    assert figures["loss/a"] == pytest.approx(5 / 3) and figures["x/b"] == math.inf
    for _ in range(2):
        meter.add({"a": torch.tensor(-math.inf), "x/b": torch.tensor(1.0)}, 1.0)
    assert "loss/a" not in meter.read() and (meter.skipped, meter.row) == (2, 2)


REWIND = [
    "trainer.on_nonfinite=rewind", "trainer.checkpoint_every=4", "trainer.eval_every=4",
    "optim.decay_from=1.0", "trainer.steps=12",
]  # fmt: skip


@pytest.mark.parametrize("model", TASKS)
def test_a_rewind_halves_the_rates(model, poisoned, tmp_path, capsys):
    poisoned(model, 7, 8)  # step 7, run again to see where
    summary = train(config(model, *REWIND), tmp_path)
    assert (summary["rewinds"], summary["steps"]) == (1, 12)
    said = capsys.readouterr().out
    text = "back to step 4 with 0.5 of the learning rates (rewind 1 of at most 10)"
    assert said.count(text) == 1
    log, counts = lines(tmp_path), [0.0] * 4 + [1.0] * 8
    found = losses(tmp_path)
    assert list(found) == list(range(1, 13))
    first = found[1]["lr/G"]
    assert [found[k]["lr/G"] / first for k in found] == [1.0] * 4 + [0.5] * 8
    assert [found_["health/rewinds"] for found_ in log if "health/rewinds" in found_] == counts
    (told,) = [line for line in log if "reason" in line]
    assert (told["step"], told["rewound_from"]) == (5, 7) and text in told["reason"]
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert all(a < b for a, b in pairwise(steps)), tag
    assert "health/rewinds/text_summary" in events.Tags()["tensors"]
    assert weights(tmp_path)["task"]["schedule"]["halvings"] == 1


def test_a_rewound_run_goes_on_as_itself(poisoned, tmp_path):
    """Killed behind a rewind and continued, or not: the same, and other batches than before."""
    seen = poisoned("resblock_gan", 7, 8)
    train(config("resblock_gan", *REWIND), tmp_path / "whole")
    seen.clear()
    train(config("resblock_gan", *REWIND, "trainer.steps=8"), tmp_path / "part")
    train(config("resblock_gan", *REWIND, "resume=auto"), tmp_path / "part")
    equal(weights(tmp_path / "whole"), weights(tmp_path / "part"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")
    seen.clear()
    seen += [1] * 99
    train(config("resblock_gan", *REWIND), tmp_path / "well")
    well, rewound = losses(tmp_path / "well"), losses(tmp_path / "whole")
    assert well[4] == rewound[4] and well[5]["loss/D"] != rewound[5]["loss/D"]
    runs = [SimpleNamespace(cfg=SimpleNamespace(seed=3), task=SimpleNamespace(halvings=k))
            for k in range(4)]  # fmt: skip
    assert len({Run.seed.fget(each) for each in runs}) == 4  # of the batches


def test_rewinds_begin_at_the_beginning_and_end(poisoned, tmp_path):
    seen = poisoned("resblock_gan", *range(3, 100))
    few = [*REWIND, "trainer.nonfinite_limit=3"]
    with pytest.raises(FloatingPointError, match=r"before step 1, first in .* \(after 3 rewinds\)"):
        train(config("resblock_gan", *few), tmp_path)
    assert len(seen) == 4 + 2 + 2 + 2
    assert weights(tmp_path)["step"] == 0
    assert weights(tmp_path)["task"]["schedule"]["halvings"] == 3


def test_a_number_that_no_log_has_shown_is_in_no_checkpoint(poisoned, tmp_path):
    """Saves fall between the step and its log: the run goes back to a healthy one, once."""
    between = [
        *REWIND,
        "trainer.log_every=6",
        "trainer.checkpoint_every=2",
        "trainer.eval_every=12",
    ]
    poisoned("resblock_gan", 3, 5)  # found at the save behind step 4, and run again to see where
    summary = train(config("resblock_gan", *between), tmp_path / "rewound")
    assert summary["rewinds"] == 1 and summary["steps"] == 12
    poisoned("resblock_gan", 3, 5)
    stop = [*between, "trainer.on_nonfinite=stop"]
    with pytest.raises(FloatingPointError, match=r"before step 4, first in the output of"):
        train(config("resblock_gan", *stop), tmp_path / "stopped")
    assert checkpoint.newest(tmp_path / "stopped").name == "step_00000002.pt"
    more = [*stop, "resume=auto", "trainer.steps=8"]
    assert train(config("resblock_gan", *more), tmp_path / "stopped")["steps"] == 8


def test_rewinds_to_one_step_are_logged_once_each(poisoned, tmp_path):
    """No key has a step twice, and what was logged at the start is still there."""
    for name, calls, start in (("four", (6, 7, 9, 10), 4), ("none", (2, 3, 5, 6), 0)):
        poisoned("resblock_gan", *calls)
        summary = train(config("resblock_gan", *REWIND), tmp_path / name)
        assert summary["rewinds"] == 2
        log = lines(tmp_path / name)
        assert [line["rewound_from"] for line in log if "reason" in line] == [start + 2]
        keys = [(line["step"], key) for line in log for key in line.keys() - {"step", "protocol"}]
        assert len(keys) == len(set(keys))
        assert [line["step"] for line in log if "reference/fid_real" in line] == [0, 4, 8, 12]
        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert [event.step for event in events.Scalars("reference/fid_real")] == [0, 4, 8, 12]


def test_a_pool_keeps_numbers_alone():
    pool = ImagePool(4)
    x = torch.randn(4, 3, 2, 2)
    x[1, 0] = math.nan
    assert torch.equal(pool.query(x).nan_to_num(), x.nan_to_num())
    assert pool.images.isfinite().all() and torch.equal(pool.images[0], x[0])
    for _ in range(8):
        pool.query(torch.full((4, 3, 2, 2), math.nan))
    assert pool.images.isfinite().all()
    json.dumps(pool.images.tolist(), allow_nan=False)
