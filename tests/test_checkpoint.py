"""Written whole or not at all, read without running code, and continued only as it was begun."""

import os
import pickle
import random

import numpy as np
import pytest
import torch

from gannorm.errors import RequestError
from gannorm.training import checkpoint


def refusal(path) -> str:
    with pytest.raises(RequestError) as info:
        checkpoint.load(path)
    return str(info.value)


def test_round_trip(tmp_path):
    path = tmp_path / "step_00000001.pt"
    content = {
        "step": 1, "seconds": 0.5, "none": None, "list": [1, "a"], "nested": {"b": True, 3: (1, 2)},
        "x": torch.randn(3, 2), "bf16": torch.randn(2).bfloat16(), "u8": torch.arange(3).byte(),
    }  # fmt: skip
    checkpoint.save(path, content)
    read = checkpoint.load(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    for key in ("x", "bf16", "u8"):
        assert torch.equal(read[key], content[key]) and read[key].dtype == content[key].dtype
    rest = {k: v for k, v in content.items() if not isinstance(v, torch.Tensor)}
    assert {k: read[k] for k in rest} == rest


def test_a_crash_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoints" / "step_00000001.pt"
    path.parent.mkdir()
    checkpoint.save(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(Exception, match="lambda|pickle"):  # breaks off in the middle of the file
        checkpoint.save(path, {"x": torch.zeros(3), "bad": lambda: 0})
    assert path.read_bytes() == before and checkpoint.load(path)["x"].tolist() == [1, 1, 1]
    assert list(path.parent.iterdir()) == [path]
    path.with_suffix(".partial").touch()  # of a kill
    assert checkpoint.newest(tmp_path) == path
    checkpoint.prune(tmp_path, 3)
    assert list(path.parent.iterdir()) == [path]


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch " + os.environ["GANNORM_TEST_TOUCHED"],)


def test_code_is_refused_and_not_run(tmp_path, monkeypatch):
    touched = tmp_path / "touched"
    monkeypatch.setenv("GANNORM_TEST_TOUCHED", str(touched))
    content = {"format": checkpoint.FORMAT, "code": Code()}
    torch.save(content, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(content))
    for name in ("torch.pt", "pickle.pt"):
        message = refusal(tmp_path / name)
        assert str(tmp_path / name) in message and not touched.exists()
        # torch's own words would have the reader switch the protection off.
        assert "weights_only" not in message and "\x1b" not in message and "\n" not in message
    pickle.loads((tmp_path / "pickle.pt").read_bytes())
    assert touched.exists()  # it would have run


GARBAGE = {
    "empty": b"", "text": b"hello", "line": b"a\n", "json": b'{"step": 1}', "zeros": bytes(1000),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "zip": b"PK\x03\x04" + bytes(range(256)),
    "pickle": pickle.dumps({"format": 1}, 4), "end": b"\x80\x02.",
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_refused_by_name(tmp_path, kind):
    (tmp_path / "x.pt").write_bytes(GARBAGE[kind])
    message = refusal(tmp_path / "x.pt")
    assert message.startswith(str(tmp_path / "x.pt")) and "\n" not in message


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_truncated_file_is_refused_by_name(tmp_path, share):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"x": torch.randn(50, 50), "rng": checkpoint.rng_state()})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert str(path) in refusal(path)


def test_damaged_file_is_refused_by_name(tmp_path):
    path, rng = tmp_path / "x.pt", random.Random(0)
    checkpoint.save(path, {"x": torch.randn(5), "config": {"a": 1, "b": "c"}})
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 5, 50))):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        assert str(path) in refusal(path)


@pytest.mark.parametrize("content", [torch.ones(3), [1], {"w": torch.ones(3)}, {"format": "a"}])
def test_foreign_torch_file_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert f"{tmp_path / 'x.pt'} is not a gannorm checkpoint" in refusal(tmp_path / "x.pt")


def test_missing_file_is_refused_by_name(tmp_path):
    for path in (tmp_path / "gone.pt", tmp_path):
        assert str(path) in refusal(path)


def test_newest_resolve_and_prune(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert checkpoint.newest(run) is None
    with pytest.raises(RequestError, match="run"):
        checkpoint.resolve(run)
    folder.mkdir(parents=True)
    with pytest.raises(RequestError, match="run holds no checkpoints"):
        checkpoint.resolve(run)
    with pytest.raises(RequestError, match="gone"):
        checkpoint.resolve(tmp_path / "gone")
    steps = [10, 9, 100, 99, 2000]
    for step in steps:
        checkpoint.save(folder / f"step_{step:08d}.pt", {})
    (folder / "step_00009999.partial").touch()
    (folder / "notes.pt").touch()
    newest = folder / "step_00002000.pt"
    assert checkpoint.newest(run) == checkpoint.resolve(run) == newest
    other = folder / "step_00000010.pt"
    assert checkpoint.resolve(other) == other
    checkpoint.prune(run, 3)
    assert {p.name for p in folder.iterdir()} == {
        "step_00000099.pt", "step_00000100.pt", "step_00002000.pt", "notes.pt",
    }  # fmt: skip
    checkpoint.prune(run, 1)
    assert sorted(folder.glob("step_*")) == [newest]
    checkpoint.prune(tmp_path / "gone", 1)


def draw():
    return (
        torch.randn(3).tolist(), torch.randint(10**9, (1,)).item(),
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
    )  # fmt: skip


def test_generators_go_on_where_they_stopped(tmp_path):
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    draw()
    np.random.randn()  # half of a pair of normal numbers: the other one is part of the state
    checkpoint.save(tmp_path / "x.pt", {"rng": checkpoint.rng_state()})
    expected = draw()
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    assert draw() != expected
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "x.pt")["rng"])
    assert draw() == expected


CONFIG = {
    "seed": 0, "resume": None,
    "model": {"name": "cyclegan", "width": 16},
    "norm": {"name": "instance", "backend": "auto", "eps": 1e-5},
    "data": {"name": "digits_m", "batch_size": 8, "num_workers": 0, "root": "a", "download": True},
    "optim": {"lr_g": 1e-3, "beta1": 0.5}, "trainer": {"steps": 10, "precision": "fp32"},
}  # fmt: skip


def changed(**changes):
    """CONFIG with other values: section__key=value."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in CONFIG.items()}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return config


def test_what_may_differ(tmp_path):
    now = changed(
        resume="auto", trainer={"steps": 99, "new": 1}, norm__backend="torch", data__root="b",
        data__num_workers=4, data__download=False, optim__lr_g=1e-5,
    )  # fmt: skip
    changes = checkpoint.check_same(CONFIG, now, tmp_path)
    assert any(line.startswith("optim.lr_g: ") and line.endswith(" -> 1e-05") for line in changes)
    assert not any(line.startswith("resume") for line in changes)
    assert checkpoint.check_same(CONFIG, changed(), tmp_path) == []
    assert checkpoint.check_same(CONFIG, changed(optim__newer=1), tmp_path) == []


def test_every_other_difference_is_named(tmp_path):
    now = changed(seed=1, model__width=32, optim__beta1=0.9, data__batch_size=4, norm__eps=1e-3)
    with pytest.raises(RequestError) as info:
        checkpoint.check_same(CONFIG, now, tmp_path / "x.pt")
    message = str(info.value)
    for part in (
        "x.pt", "seed=1 (the run: 0)", "model.width=32 (the run: 16)", "data.batch_size=4",
        "optim.beta1=0.9 (the run: 0.5)", "norm.eps=0.001", "overrides",
    ):  # fmt: skip
        assert part in message
    assert "lr_g" not in message and "trainer" not in message and "\n" not in message
    gone = changed()
    del gone["optim"]["beta1"]
    with pytest.raises(RequestError, match=r"optim\.beta1"):
        checkpoint.check_same(CONFIG, gone, tmp_path)


@pytest.mark.parametrize("key", ["norm.backends", "trainers", "resumed", "data.rooted"])
def test_free_keys_free_nothing_else(tmp_path, key):
    section, _, name = key.partition(".")
    with pytest.raises(RequestError, match=key):
        checkpoint.check_same(
            changed(**{f"{section}__{name}" if name else section: 1}), CONFIG, tmp_path
        )
