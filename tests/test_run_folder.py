"""A run folder is one process's, and a file in it is whole or not there."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_loop import config
from test_train import CYCLEGAN, run

from gannorm.errors import RequestError
from gannorm.training import folder
from gannorm.training.folder import LOCK, owned, replacing, write_json
from gannorm.training.loop import train

ROOT = Path(__file__).parents[1]
# Owns the folder, in a child too, which outlives it as a loader's worker may.
OWNER = """
import os, sys, time
from pathlib import Path
from gannorm.training.folder import owned
with owned(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that has the folder `run`, and its child's id."""
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_first_is_dead(owner, tmp_path):
    process, child = owner
    for _ in range(2):
        with pytest.raises(RequestError, match=f"{tmp_path / 'run'} .process {process.pid} on "):
            train(config("resblock_gan", "trainer.steps=2"), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]
    process.kill()
    process.wait()
    os.kill(child, 0)  # lives
    with owned(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"{os.getpid()} on ")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_the_command_refuses_in_one_line(owner, tmp_path):
    process, _ = owner
    done = run(*CYCLEGAN, f"hydra.run.dir={tmp_path / 'run'}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: another run is writing to ")
    assert str(tmp_path / "run") in line and f"process {process.pid} on" in line
    assert "hydra.run.dir=" in line


def test_one_process_does_not_enter_twice(tmp_path):
    with owned(tmp_path / "a"), owned(tmp_path / "b"):
        for name in ("a", "b", "b/../a"):
            with (
                pytest.raises(RequestError, match=rf"this process, {os.getpid()}"),
                owned(tmp_path / name),
            ):
                pass
        assert (tmp_path / "a" / LOCK).exists()
    with owned(tmp_path / "a"):
        pass


def test_one_process_does_not_enter_by_another_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with owned(tmp_path / "run"):
        with pytest.raises(RequestError, match="this process"), owned(tmp_path / "link"):
            pass
        assert (tmp_path / "run" / ".lock").exists()


def test_what_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(RequestError), owned(tmp_path / "new"):
        raise RequestError("no")
    assert not (tmp_path / "new").exists()
    with owned(tmp_path / "kept"):
        (tmp_path / "kept" / "x").touch()
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["x"]


def test_a_disk_without_locks_is_told_of(tmp_path, capsys, monkeypatch):
    def lockf(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with owned(tmp_path):
        pass
    assert "no lock on the run folder (No locks available)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"cannot write to .*file/run: Not a dir.*run\.dir="):
        train(config("resblock_gan", "trainer.steps=2"), tmp_path / "file" / "run")


def test_whole_or_what_was_there_before(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def replaced(old, new):
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(folder.os, "fsync", synced)
    monkeypatch.setattr(folder.os, "replace", replaced)
    write_json(tmp_path / "x.json", {})
    assert done == ["x.partial", "rename", tmp_path.name]


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock_though_its_workers_live(tmp_path):
    """Of real training: SIGKILL with loaders at work, and its continuation at once."""
    command = [
        sys.executable, "train.py", *CYCLEGAN, "trainer.steps=100000", "data.num_workers=2",
        "trainer.checkpoint_every=2", "trainer.log_every=1", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    said = (tmp_path / "said").open("w")
    process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/step_*.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    again = run(*CYCLEGAN, f"hydra.run.dir={tmp_path / 'run'}", "resume=auto")
    assert again.returncode == 2 and f"process {process.pid} on" in again.stderr
    process.kill()
    process.wait()
    alive = [pid for pid in children if Path(f"/proc/{pid}/fd").exists()]
    with owned(tmp_path / "run"):
        assert alive  # they end when they notice
