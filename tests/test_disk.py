"""A disk that is full, read-only or gone: told in a line, and training goes on where it can."""

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import config, scripted
from test_train import CYCLEGAN

from gannorm.errors import RequestError, RunError
from gannorm.training import checkpoint, saving
from gannorm.training.folder import owned
from gannorm.training.log import Log
from gannorm.training.loop import train
from gannorm.training.monitor import Monitor
from gannorm.training.run import BEST

ROOT = Path(__file__).parents[1]
FULL = "No space left on device"


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting needs root, on Linux")
    mount("-t", "tmpfs", "-o", "size=1m", "gannorm-test", path)
    yield path
    while subprocess.run(["umount", "-l", path], capture_output=True, check=False).returncode == 0:
        pass


def fill(disk: Path) -> Path:
    """Leave no room; the file that takes it."""
    path = disk / "filling"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


IMAGES = {"x": (torch.zeros(1, 3, 32, 32), 1)}


def test_figures_wait_for_a_full_disk(disk, capfd):
    """All of them arrive, in order; each kind of file is told of twice."""
    monitor = Monitor(disk, 0)
    wide = {f"loss/{k}": 0.5 for k in range(90)}
    monitor.scalars(1, wide)
    filling = fill(disk)
    for step in range(2, 12):
        monitor.scalars(step, wide)
        monitor.images(step, IMAGES)
        monitor.flush()
    err = capfd.readouterr().err
    kinds = ("figures", "TensorBoard's events", "pictures")
    for kind in kinds:
        assert re.search(rf"cannot write {kind} \({disk}.*\): {FULL}; training goes on, ", err)
    assert len(err.splitlines()) == 3
    filling.unlink()
    monitor.scalars(12, wide)
    monitor.images(12, IMAGES)
    monitor.close()
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 3 and all(re.search("can be written again$", line) for line in err)
    assert [line["step"] for line in lines(disk)] == list(range(1, 13))
    assert scalars(disk, "loss/7") == [(step, 0.5) for step in range(1, 13)]
    assert [p.name for p in (disk / "samples").iterdir()] == ["step_00000012.png"]


def test_what_the_disk_never_takes_is_counted(disk, capfd):
    monitor = Monitor(disk, 0)
    monitor.scalars(0, {"x": 1.0})
    fill(disk)  # but for the rest of a block
    for step in range(1, 300):
        monitor.scalars(step, {"x": 1.0})
    monitor.close()
    said = capfd.readouterr().err
    assert re.search(r"\d+ records of .*metrics.jsonl could not be written", said)
    steps = [line["step"] for line in lines(disk)]  # whole lines, from the beginning
    assert steps == list(range(len(steps))) and 0 < len(steps) < 300


def test_a_disk_that_goes_away_and_comes_back(disk, tmp_path, capfd):
    """Nothing is written where it was mounted meanwhile."""
    away = tmp_path / "away"
    away.mkdir()
    (disk / "run").mkdir()
    monitor = Monitor(disk / "run", 0)
    monitor.scalars(1, {"x": 1.0})
    subprocess.run(["mount", "--bind", away, disk], check=True)  # hides it
    monitor.scalars(2, {"x": 2.0})
    monitor.images(2, IMAGES)
    monitor.flush()  # TensorBoard's thread has tried too
    gone = capfd.readouterr().err
    assert gone.count("No such file or directory; training goes on") == 3
    assert not list(away.iterdir())
    subprocess.run(["umount", disk], check=True)
    monitor.scalars(3, {"x": 3.0})
    monitor.close()
    assert [line["step"] for line in lines(disk / "run")] == [1, 2, 3]
    assert scalars(disk / "run", "x") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_no_run_goes_back_on_a_full_disk(disk):
    monitor = Monitor(disk, 0)
    monitor.scalars(1, {f"x{k}": 1.0 for k in range(999)})
    fill(disk)
    with pytest.raises(RunError, match=f"cannot go back to step 1: .*{FULL}"):
        monitor.restart(1)


def test_what_is_refused_when_a_file_is_closed_is_written_once(tmp_path, monkeypatch, capsys):
    """As quotas are on NFS."""
    log, refusals = Log(tmp_path / "x", "figures"), [OSError(errno.EDQUOT, "Disk quota exceeded")]

    class Closing(io.FileIO):
        def close(self):
            written = not self.closed and self.tell() > 0
            super().close()
            if written and refusals:
                raise refusals.pop()

    monkeypatch.setattr(
        "gannorm.training.log.open", lambda path, mode, **kw: Closing(path, "r+"), raising=False
    )
    for k in range(3):
        log.write(f"{k}\n".encode())
    assert not refusals and "Disk quota exceeded" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "0\n1\n2\n"


def test_a_folder_on_a_full_disk_is_refused_and_left(disk):
    fill(disk)
    with pytest.raises(RequestError, match=FULL), owned(disk / "run"):
        pass
    assert not (disk / "run").exists()


def test_the_best_that_cannot_be_written_is_not_the_best(tmp_path, monkeypatch, capsys):
    """A folder is in its place; the next evaluation that is better than what is there is kept."""
    monkeypatch.setattr(saving, "PAUSES", ())
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    few = ["trainer.eval_every=2", "trainer.checkpoint_every=2"]

    def begin():
        (tmp_path / "run" / BEST).mkdir(parents=True)

    cfg = config("resblock_gan", *few, "trainer.steps=4")
    assert train(cfg, tmp_path / "run", begin)["best"]["value"] is None
    assert f"{tmp_path / 'run' / BEST} is given up" in capsys.readouterr().err
    (tmp_path / "run" / BEST).rmdir()
    cfg = config("resblock_gan", *few, "trainer.steps=6", "resume=auto")
    assert train(cfg, tmp_path / "run")["best"] == {"figure": "fid", "value": 3.0, "step": 6}
    assert checkpoint.load(tmp_path / "run" / BEST)["best"]["value"] == 3.0


def test_memory_for_what_waits_has_an_end(disk, capsys, monkeypatch):
    monkeypatch.setattr("gannorm.training.log.ROOM", 100)
    log = Log(disk / "x", "figures")
    filling = fill(disk)
    for k in range(9):
        log.write(bytes([48 + k]) * 30)
    assert len(log.waiting) == 3
    filling.unlink()
    log.close()
    assert (disk / "x").read_bytes() == b"6" * 30 + b"7" * 30 + b"8" * 30
    assert "can be written again; 6 records were too many" in capsys.readouterr().err


def test_a_checkpoint_without_room_leaves_the_one_before(disk):
    path, half = disk / "x.pt", {"x": torch.zeros(150_000)}  # 600 kB of 1 MB
    checkpoint.save(path, {**half, "step": 1})
    before = path.read_bytes()
    for other in (path, disk / "y.pt"):
        with pytest.raises(OSError, match=FULL):
            checkpoint.save(other, {**half, "step": 2})
    assert path.read_bytes() == before and checkpoint.load(path)["step"] == 1
    assert list(disk.iterdir()) == [path]  # no half of one


def test_a_checkpoint_is_tried_again(disk, capsys, monkeypatch):
    monkeypatch.setattr(saving, "PAUSES", (0.05,) * 40)
    filling, path = fill(disk), disk / "x.pt"
    timer = threading.Timer(0.3, filling.unlink)
    timer.start()
    assert saving.attempt(path, {"x": torch.zeros(1000)}, "none before") is None
    timer.join()
    told, again = capsys.readouterr().err.splitlines()
    assert told.startswith(f"cannot write {path}: {FULL}; none before; trying again for 2 s")
    assert again == f"{path} is written now" and checkpoint.load(path)["x"].shape == (1000,)
    monkeypatch.setattr(saving, "PAUSES", (0.01, 0.01))
    error = saving.attempt(disk / "gone" / "x.pt", {}, "none before")
    assert isinstance(error, FileNotFoundError) and not (disk / "gone").exists()


def test_a_limit_on_the_size_of_files(tmp_path, capfd):
    """As a quota refuses: with EFBIG here, half of a record written."""
    monitor = Monitor(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        for step in range(60):
            monitor.scalars(step, {"x": 1.0})
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path / "x.pt", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monitor.scalars(60, {"x": 1.0})
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(61))
    assert [step for step, _ in scalars(tmp_path, "x")] == list(range(61))
    assert not list(tmp_path.glob("x.*")) and "Traceback" not in capfd.readouterr().err


# ---- train.py as a user runs it

EACH = [
    *CYCLEGAN[:-1], "trainer.log_every=1", "trainer.eval_every=100000", "trainer.device=cpu",
    "trainer.sample_every=2", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=2",
]  # fmt: skip


class Training:
    """A run of train.py, its output in a file."""

    def __init__(self, run_dir: Path, said: Path, *overrides: str, size: int | None = None):
        self.run_dir, self.said = run_dir, said

        def limit():
            if size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        command = [sys.executable, "train.py", *EACH, *overrides, f"hydra.run.dir={run_dir}"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=said.open("w"), stderr=subprocess.STDOUT, preexec_fn=limit
        )

    def until(self, words: str) -> None:
        end = time.monotonic() + 120
        while words not in self.text():
            assert time.monotonic() < end and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def until_saved(self) -> None:
        end = time.monotonic() + 120
        while not list(self.run_dir.glob("checkpoints/step_*.pt")):
            assert time.monotonic() < end and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return self.said.read_text().replace("\r", "\n")

    def end(self) -> str:
        try:
            self.process.wait(120)
        finally:
            self.process.kill()
        assert "Traceback" not in self.text()
        return self.text()


def last_line(said: str) -> str:
    return said.rstrip().splitlines()[-1]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to_is_refused(disk, tmp_path):
    mount("-o", "remount,ro", disk)
    said = Training(disk / "run", tmp_path / "said", "trainer.steps=2").end()
    assert re.fullmatch(
        rf"error: cannot write to .*{disk}/run.*: Read-only file system; .*hydra.run.dir=\n", said
    )


@pytest.mark.slow
def test_a_run_on_a_full_disk(disk, tmp_path):
    """Trains to its end without a checkpoint, and says so; with room it saves the next one."""
    training = Training(disk / "run", tmp_path / "said", "trainer.steps=100000")
    training.until_saved()
    filling = fill(disk)
    training.until("is given up; training goes on")
    filling.unlink()
    shutil.rmtree(disk / "run" / "samples")  # pictures need more and more
    before = checkpoint.newest(disk / "run")
    while checkpoint.newest(disk / "run") == before:
        time.sleep(0.05)
    fill(disk)
    time.sleep(1)
    training.process.send_signal(signal.SIGTERM)
    last = last_line(training.end())
    assert training.process.returncode == 1
    newest = checkpoint.newest(disk / "run")
    assert checkpoint.load(newest)["step"] > 0
    assert re.fullmatch(
        rf"error: the last checkpoint, {disk}/run/checkpoints/step_\d+.pt, cannot be written: "
        rf"{FULL}; the newest whole one is {newest}", last,
    )  # fmt: skip
    assert not list((disk / "run").rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["read-only", "gone"])
def test_a_disk_that_is_taken_away_from_a_run(how, disk, tmp_path):
    training = Training(disk / "run", tmp_path / "said", "trainer.steps=100000")
    training.until_saved()
    if how == "gone":
        subprocess.run(["umount", "-l", disk], check=True)
        reason = "No such file or directory"
    else:  # through a second mount: the first is busy
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        reason = "Read-only file system"
    for words in ("trying again for 10 s", "cannot write figures"):
        training.until(words)
    training.process.send_signal(signal.SIGTERM)
    said = training.end()
    assert training.process.returncode == 1
    for what in ("figures", "TensorBoard's events"):
        assert len(re.findall(rf"cannot write {what} \(.*: {reason}; training goes on", said)) == 1
    last = last_line(said)
    assert last.startswith("error: the last checkpoint,") and reason in last
    assert re.search(rf"the newest whole one is {disk}/run/checkpoints/step_\d+.pt", last)
    if how == "gone":
        assert not list(disk.iterdir())  # nothing is written below
    else:
        subprocess.run(["umount", disk], check=True)
        newest = checkpoint.newest_whole(disk / "run")
        assert newest is not None and str(newest) in last
        with owned(disk / "run"):  # it can go on
            pass


@pytest.mark.slow
def test_a_limit_on_a_runs_files(tmp_path):
    training = Training(tmp_path / "run", tmp_path / "said", "trainer.steps=4", size=100_000)
    said = training.end()  # a checkpoint has 200 kB
    assert training.process.returncode == 1
    assert "step_00000002.pt: File too large; there is none before it; trying again" in said
    last = last_line(said)
    assert re.fullmatch(
        r"error: the last checkpoint, .*/step_00000004.pt, cannot be written: File too large; "
        r"there is none before it", last,
    )  # fmt: skip
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
