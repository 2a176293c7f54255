"""gannorm.parallel, and what takes its part of a batch: two processes, by gloo, and one."""

import math
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing

from gannorm import parallel
from gannorm.data.batches import batches
from gannorm.data.digest import digest
from gannorm.errors import RequestError
from gannorm.metrics.observations import Observations
from gannorm.models.cyclegan import Dropout
from gannorm.schema import DigitsConfig
from gannorm.tasks.augment import diff_augment
from gannorm.tasks.losses import ImagePool
from gannorm.training import request
from gannorm.training.loop import saved
from gannorm.training.nonfinite import Skips
from gannorm.training.run import Meter, Run


def whole_batch(rank):
    torch.manual_seed(3)
    whole = torch.rand(8, 5)
    torch.manual_seed(3)
    part = parallel.drawn(lambda n: torch.rand(n, 5), 4)
    assert torch.equal(part, whole[parallel.own(8)])
    torch.manual_seed(3)
    real, fake = parallel.drawn(lambda n: torch.rand(n, 5), 4, batches=2).split(2)
    assert torch.equal(real, whole[:4][parallel.own(4)])
    assert torch.equal(fake, whole[4:][parallel.own(4)])
    parts = [slice(count * r // 2, count * (r + 1) // 2) for count in (7,) for r in (0, 1)]
    assert parallel.own(7) == parts[rank] and [p.stop for p in parts] == [3, 7]


def sums(rank):
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.full((2, 3), float(rank), dtype=dtype), torch.arange(4.0).to(dtype) * rank]
        tensors.append(torch.zeros(2, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last))
        tensors[2][..., 1] = rank
        tensors = parallel.means(tensors)
        assert (tensors[0] == 0.5).all() and torch.equal(tensors[1], torch.arange(4.0) / 2)
        assert (tensors[2][..., 1] == 0.5).all() and not tensors[2][..., 0].any()
    with parallel.alone():
        (alone,) = parallel.means([torch.tensor([float(rank)])])
        assert alone == rank and parallel.world() == 1 and parallel.leads()


def gathers(rank):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64):
        every = parallel.gathered(torch.full((2, 3), rank + 1, dtype=dtype))
        assert every.dtype is dtype and every[:, 0].tolist() == [1, 1, 2, 2]
    assert parallel.joined(["a"] * (rank + 1)) == ["a", "a", "a"]
    assert parallel.joined([rank] if rank else []) == [1]
    parts = [Observations(torch.full((rank + 1, 2), float(rank)), labels=torch.arange(rank + 1))]
    found = Observations.of_all(parts, parallel.CPU)
    assert found.features[:, 0].tolist() == [0, 1, 1] and found.labels.tolist() == [0, 0, 1]
    assert found.logits is None


def first(rank):
    assert parallel.from_first(lambda: {"from": rank, "t": torch.ones(2)})["from"] == 0
    tensors = [torch.full((2, 2), rank), torch.full((3,), rank + 0.5)]
    parallel.broadcast_(tensors)
    assert tensors[0].tolist() == [[0, 0], [0, 0]] and (tensors[1] == 0.5).all()


def questions(rank):
    question = parallel.Question()
    for said, answer in ((0, 0), (15 * rank, 15), (2, 2)):
        question.ask(said)
        assert question.answer() == answer


def replicas(rank):
    tensors = {"same": torch.arange(6.0), "count": torch.tensor(3), "w": torch.randn(0)}
    tensors["last"] = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert parallel.differing(tensors) is None
    tensors["last"][3, 2, 1, 1] += rank * 1e-30
    assert parallel.differing(tensors) == "last of process 1"
    task = SimpleNamespace(replicas_differ=lambda: parallel.differing(tensors))
    with pytest.raises(RuntimeError, match="at step 7 last of process 1 is not the first proc"):
        Run.check_replicas(SimpleNamespace(task=task, step=7))


def one_goes_first(rank):
    os.environ["LOCAL_RANK"] = str(rank)
    path = Path(os.environ["SHARED"]) / "made"
    with parallel.one_first():
        if rank == 0:
            time.sleep(0.3)
            path.write_text("made")
        assert path.exists()


def pools(rank):
    """As one process's, to the bit."""
    images = torch.arange(80.0).view(10, 8, 1, 1, 1)
    torch.manual_seed(1)
    pool, out = ImagePool(5), []
    for batch in images:
        out.append(pool.query(batch[parallel.own(8)]))
    torch.manual_seed(1)
    with parallel.alone():
        single, expected = ImagePool(5), []
        for batch in images:
            expected.append(single.query(batch))
    part = parallel.own(8)
    assert all(torch.equal(a, b[part]) for a, b in zip(out, expected, strict=True))
    assert torch.equal(pool.images, single.images)


def augmentation(rank):
    policy = ("color", "translation", "cutout")
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with parallel.alone():
        expected = diff_augment(images, policy, 2)
    torch.manual_seed(1)
    part = parallel.own(4)
    own = torch.cat([images[:4][part], images[4:][part]])
    found = diff_augment(own, policy, 2)
    assert torch.equal(found, torch.cat([expected[:4][part], expected[4:][part]]))


def dropout(rank):
    """Half of the values go, those of one process; the generators stay alike."""
    layer = Dropout(0.5)
    torch.manual_seed(0)
    with parallel.alone():
        whole = layer(torch.ones(4, 1000))
    torch.manual_seed(0)
    kept = layer(torch.ones(2, 1000))
    assert torch.equal(kept, whole[parallel.own(4)])
    assert set(kept.unique().tolist()) == {0.0, 2.0} and 0.45 < (kept > 0).float().mean() < 0.55
    every = parallel.gathered(kept)
    assert not torch.equal(every[:2], every[2:])
    assert len(set(map(float, parallel.gathered(torch.rand(1))))) == 1
    assert torch.equal(layer.eval()(kept), kept)


def shares(rank):
    data = DigitsConfig(name="digits", image_size=8, channels=1, batch_size=6, num_workers=0)
    old = {"data": {"batch_size": 6}}
    run = {"data": {"batch_size": 6, "global_batch_size": 24}}
    assert divided(data, None) == (6, 12)
    assert divided(data, old) == (3, 6)  # the batch of a single process goes on
    assert divided(data, run) == (12, 24)
    assert divided(data.model_copy(update={"batch_size": 12}), run) == (12, 24)
    assert divided(data.model_copy(update={"global_batch_size": 8}), run) == (4, 8)
    with pytest.raises(RequestError, match="data.global_batch_size=9 cannot be shared by 2 proc"):
        divided(data.model_copy(update={"global_batch_size": 9}), None)


def divided(data, saved):
    shared = request.divided(data, saved)
    return shared.batch_size, shared.global_batch_size


def skipped(rank):
    """A loss that is infinite in one process alone: means over the others' steps, alike in both."""
    meter = Meter(1, Skips(lambda name: True))
    for loss in (1.0, math.inf if rank else 2.0, 3.0):
        meter.add({"a": torch.tensor(loss)}, 1.0)
    before = meter.means()
    meter.share()
    assert meter.means() == before == {"loss/a": pytest.approx((1 + 2 + 3 + 1 + 3) / 5)}
    assert meter.read()["loss/a"] == before["loss/a"] and meter.skipped == 1 and meter.row == 0


CHECKS = (
    whole_batch, sums, gathers, first, questions, replicas, one_goes_first, pools, augmentation,
    dropout, shares, skipped,
)  # fmt: skip


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ["SHARED"] = folder
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank
    )
    for check in CHECKS:
        try:
            check(rank)
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        (Path(folder) / f"{check.__name__}.{rank}").write_text(failure)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    multiprocessing.spawn(work, (str(folder),), 2)
    return folder


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(results, check):
    assert [(results / f"{check.__name__}.{rank}").read_text() for rank in (0, 1)] == ["", ""]


def test_one_process_communicates_with_nobody():
    assert (parallel.world(), parallel.rank(), parallel.leads()) == (1, 0, True)
    tensor = torch.ones(3)
    assert parallel.means([tensor])[0] is tensor
    parallel.broadcast_([tensor])
    assert parallel.gathered(tensor) is tensor and parallel.own(5) == slice(0, 5)
    assert parallel.differing({"t": tensor}) is None
    assert parallel.from_first(lambda: 3) == 3 and parallel.joined([1]) == [1]


def test_processes_that_are_started_again_find_the_folder_of_those_before(tmp_path, monkeypatch):
    family = tmp_path / "family"
    new = str(family / "now")

    def started(call, attempt=0):
        path = f"/tmp/{call}/none_y/attempt_{attempt}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        return request.run_folder(str(family), "now", None)

    assert started("a") == new
    for number in "12":
        (family / number).mkdir(parents=True)
    request.mark(family / "1")
    assert started("b") == new
    request.mark(family / "2")
    (family / "3").mkdir()
    assert started("b", 1) == started("b", 2) == str(family / "2")
    assert started("a", 1) == str(family / "1")
    assert started("a") == started("c", 1) == new  # another call's is never taken
    # Nor where the folder is given: what was refused at first is refused again.
    (family / "1" / "metrics.jsonl").touch()
    cfg = SimpleNamespace(resume=None)
    for attempt in (0, 1):
        started("c", attempt)
        with pytest.raises(RequestError, match="already holds a run"):
            saved(cfg, family / "1")
    started("a", 1)
    assert saved(cfg, family / "1") == (None, None)  # it died before its first checkpoint


# ---- batches in parts


class Numbers:
    def __len__(self):
        return 10

    def fetch(self, index, generator):
        return {"index": torch.tensor(index), "noise": torch.rand(len(index), generator=generator)}

    def digest(self):
        return digest("numbers")


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_of_a_batch_are_the_batch(workers):
    options = {"batch_size": 6, "start": 2, "stop": 5, "seed": 1}
    whole = batches([Numbers()], **options)
    parts = [
        batches([Numbers()], **options, num_workers=workers, own=own)
        for own in (slice(0, 2), slice(2, 6))
    ]
    for (expected,), *pieces in zip(whole, *parts, strict=True):
        for key, values in expected.items():
            assert torch.equal(torch.cat([piece[0][key] for piece in pieces]), values)


@pytest.mark.parametrize("preprocess", ["resize_and_crop", "scale_width_and_crop", "crop", "none"])
def test_of_files_only_the_own_part_is_read(tmp_path, preprocess, monkeypatch):
    """With the crops and mirrors that the whole batch has."""
    from gannorm.data import files as module
    from gannorm.data.files import Files

    cfg = SimpleNamespace(size=(8, 8), load=(12, 12), preprocess=preprocess, flip=True)
    rng, known = np.random.default_rng(0), []
    for number in range(6):
        size = (8, 8) if preprocess == "none" else (12 + number, 14)
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
        known.append(SimpleNamespace(path=path, size=size, content=str(number)))
    source = Files(known, list(range(6)), cfg, 3, True)
    read = []
    monkeypatch.setattr(module, "scaled", watching(module.scaled, read))
    index = [5, 0, 3, 3, 1]
    whole = source.fetch(index, torch.Generator().manual_seed(2))
    assert len(read) == 5
    part = source.fetch_part(index, torch.Generator().manual_seed(2), slice(2, 4))
    assert [path.stem for path in read[5:]] == ["3", "3"]
    assert torch.equal(part["image"], whole["image"][2:4])
    assert part["label"].tolist() == [3, 3]


def watching(scaled, read):
    def watched(path, *args):
        read.append(path)
        return scaled(path, *args)

    return watched
