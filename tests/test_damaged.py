"""A damaged checkpoint of a run folder is named, and the one before it is taken."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_inference import CONDITIONAL, TRANSLATION, gannorm, make_run, refused
from test_loop import config, equal, weights

from gannorm.commands.demo import checkpoints
from gannorm.errors import RequestError
from gannorm.training import checkpoint, seal
from gannorm.training.loop import train

pytestmark = pytest.mark.usefixtures("quick_runs")
STEPS = ["trainer.checkpoint_every=2", "trainer.keep_checkpoints=9", "optim.schedule=constant"]


def damage(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def step(run_dir: Path, number: int) -> Path:
    return run_dir / "checkpoints" / f"step_{number:08d}.pt"


@pytest.fixture(scope="module")
def runs(quick_runs, tmp_path_factory):
    """A run of 6 steps, in `whole`, and its continuation to 8."""
    root = tmp_path_factory.mktemp("runs")
    train(config("resblock_gan", *STEPS, "trainer.steps=6"), root / "six")
    shutil.copytree(root / "six", root / "eight")
    train(config("resblock_gan", *STEPS, "trainer.steps=8", "resume=auto"), root / "eight")
    return root


@pytest.fixture
def run_dir(runs, tmp_path):
    """A copy of the first, its two newest checkpoints damaged."""
    shutil.copytree(runs / "six", tmp_path / "run")
    damage(step(tmp_path / "run", 6))
    step(tmp_path / "run", 4).write_bytes(step(tmp_path / "run", 4).read_bytes()[:-1000])
    return tmp_path / "run"


def names_both(said: str, run_dir: Path) -> bool:
    lines = [line for line in said.splitlines() if "is damaged" in line]
    return len(lines) == 2 and all(
        str(step(run_dir, number)) in line and "taking the one before it, step_00000002.pt" in line
        for number, line in zip((6, 4), lines, strict=True)
    )


@pytest.mark.parametrize("how", ["auto", "folder", "torchrun"])
def test_training_goes_on_from_the_one_before(how, run_dir, runs, capsys, monkeypatch):
    resume = {"auto": "resume=auto", "folder": f"resume={run_dir}", "torchrun": "resume=null"}[how]
    if how == "torchrun":  # as its processes see it after a restart
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/attempt_1/0/error.json")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        (run_dir / ".launch").write_text("/tmp/torchelastic_x")
    train(config("resblock_gan", *STEPS, "trainer.steps=8", resume), run_dir)
    out, err = capsys.readouterr()
    assert names_both(err, run_dir) and f"from {step(run_dir, 2)} at step 2" in out
    equal(weights(run_dir), weights(runs / "eight"))
    kept = {path.name for path in (run_dir / "checkpoints").glob("step_*")}
    whole = {f"step_0000000{k}.pt" for k in (2, 4, 6, 8)}
    assert kept == {*whole, "step_00000004.damaged", "step_00000006.damaged"}


def test_all_are_damaged(run_dir, capsys):
    damage(step(run_dir, 2))
    before = sorted(run_dir.rglob("*"))
    for resume in ("auto", str(run_dir)):
        with pytest.raises(RequestError) as info:
            train(config("resblock_gan", *STEPS, "trainer.steps=8", f"resume={resume}"), run_dir)
        assert all(str(step(run_dir, number)) in str(info.value) for number in (2, 4, 6))
    assert sorted(run_dir.rglob("*")) == before  # nothing was set aside
    assert all(step(run_dir, k).name in refused(capsys, "inspect", run_dir) for k in (2, 4, 6))


def test_a_refused_run_renames_nothing(run_dir):
    before = sorted(run_dir.rglob("*"))
    for wrong in ("model.z_dim=3", "trainer.device=nothing"):
        with pytest.raises(RequestError):
            train(config("resblock_gan", *STEPS, "resume=auto", wrong), run_dir)
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("content", [{}, {"task": 1}, {"task": {"networks": {}}, "config": {}}])
def test_a_file_without_networks_is_refused(content, tmp_path, capsys):
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 1, **content}, path)
    assert f"{path} is not a gannorm checkpoint" in refused(capsys, "inspect", path)
    with pytest.raises(RequestError, match=f"{path} is not a gannorm checkpoint"):
        train(config("resblock_gan", f"resume={path}"), tmp_path / "run")


def test_a_file_that_cannot_be_read_is_not_damaged(runs, tmp_path, monkeypatch):
    """A disk that fails for a while: refused, and nothing is renamed."""
    shutil.copytree(runs / "six", tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))

    def failing(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(seal.os, "pread", failing)
    with pytest.raises(RequestError, match=r"cannot read .*step_00000006.pt: Input/output error"):
        train(config("resblock_gan", *STEPS, "trainer.steps=8", "resume=auto"), tmp_path / "run")
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("name", ["a.pt", "inside/a.pt"])  # the file is closed, or its folder
def test_a_file_of_somebody_else_is_refused_in_one_line(name, capsys):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as made:  # tmp_path is closed to others as a whole
        folder, path = Path(made), Path(made) / name
        folder.chmod(0o755)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        closed = folder / Path(name).parts[0]
        closed.chmod(0)
        try:
            os.seteuid(user or 65534)  # root may read whatever is closed
            said = refused(capsys, "inspect", path)
        finally:
            os.seteuid(user)
            closed.chmod(0o700)
    assert str(path) in said and "Permission denied" in said and "damaged" not in said


def test_one_that_was_asked_for_by_name_is_refused(run_dir, tmp_path, capsys):
    cfg = config("resblock_gan", *STEPS, "trainer.steps=8", f"resume={step(run_dir, 6)}")
    with pytest.raises(RequestError, match=rf"{step(run_dir, 6)} is damaged"):
        train(cfg, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert f"{step(run_dir, 6)} is damaged" in refused(capsys, "inspect", step(run_dir, 6))


def test_a_damaged_best_begins_anew(run_dir, capsys):
    best = run_dir / "checkpoints" / "best.pt"
    assert checkpoint.load(best)["step"] == 6
    damage(best)
    for number in (6, 4):
        step(run_dir, number).unlink()
    more = ["trainer.steps=8", "trainer.eval_every=4", "resume=auto", "metrics.patience=1"]
    train(config("resblock_gan", *STEPS, *more), run_dir)
    assert f"{best} is damaged" in capsys.readouterr().err
    assert checkpoint.load(best)["best"]["step"] >= 4  # of an evaluation since


@pytest.mark.parametrize(
    "command,overrides,classes",
    [
        (["sample", "--count", "1"], CONDITIONAL, 10),
        (["inspect"], CONDITIONAL, 10),
        (["export", "--format", "safetensors", "--net", "G"], CONDITIONAL, 10),
        (["translate", "x.png", "out", "--direction", "AtoB"], TRANSLATION, None),
    ],
)
def test_commands_take_the_one_before(command, overrides, classes, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    run = make_run(run_dir, overrides, classes)
    checkpoint.save(step(run_dir, 2), run.state_dict())
    damage(step(run_dir, 2))
    name, *rest = command
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("x.png")
    rest += {"sample": ["--out", "out"], "export": ["--out", "out.safetensors"]}.get(name, [])
    gannorm(name, run_dir, *rest)
    err = capsys.readouterr().err
    assert f"{step(run_dir, 2)} is damaged" in err and "taking the one before it, step_0000" in err
    assert step(run_dir, 2).exists()  # a command changes no run


def test_the_demo_lists_whole_ones(tmp_path, capsys):
    run = make_run(tmp_path, CONDITIONAL, 10)
    for name in ("step_00000002.pt", "best.pt"):
        checkpoint.save(tmp_path / "checkpoints" / name, run.state_dict())
    damage(step(tmp_path, 2))
    for _ in range(2):
        assert list(checkpoints(tmp_path)) == ["step_00000001.pt", "best.pt"]
    assert capsys.readouterr().err.count("is damaged") == 1
