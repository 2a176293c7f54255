"""Every benchmark command runs, writes what it should, and refuses a wrong op."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cases, norms, step, timing
from benchmarks.cases import Case
from gannorm.errors import RequestError
from gannorm.norms import functional

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def result(path: Path) -> dict:
    """A command's JSON, which has no NaN in it, behind what every result begins with."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} in {path}")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["device"] and found["date"] and found["protocol"]
    assert found["versions"]["torch"] == torch.__version__
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_norms(device: str, tmp_path: Path):
    out = tmp_path / "norms.json"
    done = run("benchmarks.norms", "--quick", "--device", device, "--out", out)
    assert done.returncode == 0, done.stderr
    found = result(out)
    assert found["refused"] == {} and found["copy_gbps"] > 0
    names = [str(c) for c in cases.quick_cases()]
    assert [c["name"] for c in found["cases"]] == [n for n in names for _ in norms.DIRECTIONS]
    protocols = {"wall"}
    if device == "cuda":
        protocols |= {f"{p}_{cache}" for p in ("events", "graph") for cache in ("warm", "cold")}
    for entry in found["cases"]:
        also = {"instance": {"compile"}, "conditional_batch": {"unconditional"}}
        who = {"ours", "eager"} | also.get(entry["op"], set())
        assert entry["times_us"].keys() >= who, entry["absent"]
        for contestant, times in entry["times_us"].items():
            assert times.keys() == protocols and min(times.values()) > 0
            share = entry["percent_of_copy"][contestant]["wall"]
            assert math.isclose(share, 100 * entry["floor_us"] / times["wall"])
        bytes_moved = entry["floor_us"] * found["copy_gbps"] * 1000
        assert math.isclose(bytes_moved, entry["floor_bytes"])
        assert entry["errors"]["ours"].keys() >= {"y", "dx"}
        assert entry["name"] in done.stdout
    assert found["growth"]["largest_jump"]["ours"]["relative"] > 0
    for relu in ("with", "without"):
        assert found["geometric_means"]["wall"][f"all {relu} relu both"]["eager"] > 0
    assert out.with_suffix(".png").exists()


def test_a_wrong_op_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out, right = tmp_path / "norms.json", functional.group_norm
    monkeypatch.setattr(functional, "group_norm", lambda *args, **k: right(*args, **k) * 1.001)
    assert norms.main(["--quick", "--only", "8x8x8", "--device", "cpu", "--out", str(out)]) == 1
    wrong = "group-2x8x8x8-fp32-channels_last-silu"
    assert f"refused, not timed: {wrong}: y off by 1.0e-03" in capsys.readouterr().err
    found = result(out)
    assert list(found["refused"]) == [wrong]
    assert {c["op"] for c in found["cases"]} == {"batch", "conditional_batch"}


def test_refused_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = ["--quick", "--out", str(tmp_path / "x.json")]
    with pytest.raises(RequestError, match="--only spectral"):
        norms.main([*out, "--only", "spectral"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (norms.main, step.main):
        with pytest.raises(RequestError, match="no GPU here; take --device cpu"):
            command([*out, "--device", "cuda"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direction", ["y", "dx", "dweight", "dbias", "dresidual"])
def test_each_tensor_is_checked(direction: str):
    """An error in one output or gradient alone is found."""
    case = Case("batch", (4, 8, 8, 8), "residual+relu")
    t = cases.tensors(case, "cpu")
    assert not cases.wrong(case, cases.errors(case, t, lambda: cases.ours(case, t)))

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.factor = backward
            return x * forward

        @staticmethod
        def backward(ctx, dy):
            return dy * ctx.factor, None, None

    def skewed() -> torch.Tensor:
        if direction == "y":
            return Skewed.apply(cases.ours(case, t), 1.001, 1.0)
        changed = dict(vars(t))
        name = direction.removeprefix("d")
        changed[name] = Skewed.apply(changed[name], 1.0, 1.01)
        return cases.ours(case, cases.Tensors(**changed))

    fault = cases.wrong(case, cases.errors(case, t, skewed))
    assert fault.startswith(f"{direction} off by") and "," not in fault


def test_nan_is_wrong():
    case = Case("instance", (1, 2, 4, 4))
    t = cases.tensors(case, "cpu")
    found = cases.errors(case, t, lambda: functional.instance_norm(t.x) * float("nan"))
    assert "y off by nan" in cases.wrong(case, found)


@pytest.mark.parametrize("case", cases.quick_cases(), ids=str)
def test_the_oracle_agrees_with_torch(case: Case):
    case = replace(case, dtype="fp32")  # the sequence rounds its steps to bf16
    t = cases.tensors(case, "cpu")
    assert not cases.wrong(case, cases.errors(case, t, lambda: cases.eager(case, t)))


def test_every_case_is_distinct_and_has_its_tensors():
    for found in (cases.cuda_cases(), cases.cpu_cases(), cases.growth_cases(False)):
        names = [str(c) for c in found]
        assert len(set(names)) == len(names)
    for case in cases.cuda_cases() + cases.cpu_cases():
        assert (case.op == "group") == (case.groups > 0) and case.dtype in cases.DTYPES


def test_contestants_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.time_cpu(runs, 100.0)
    assert times.keys() == runs.keys() and all(t["wall"] > 0 for t in times.values())
    order = order[6:]  # behind the warm-up and the estimate
    rounds = ["".join(order[k : k + 3]) for k in range(0, len(order), 3)]
    assert len(rounds) >= 5 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    behind = Counter(one[k : k + 2] for one in rounds for k in (0, 1))  # who runs behind whom
    assert len(behind) == 6 and max(behind.values()) < 3 * min(behind.values())


def test_means_and_jumps(monkeypatch: pytest.MonkeyPatch):
    def entry(eager: float, epilogue: str) -> dict:
        times = {"ours": {"wall": 1.0}, "eager": {"wall": eager}}
        return {"op": "batch", "epilogue": epilogue, "direction": "both", "times_us": times}

    slower = {"none": (2.0, 8.0), "leaky_relu": (4.0,), "relu": (3.0,), "residual+relu": (27.0,)}
    means = norms.geometric_means([entry(r, e) for e, ratios in slower.items() for r in ratios])
    four, nine = {"eager": pytest.approx(4)}, {"eager": pytest.approx(9)}
    assert means == {
        "wall": {
            "all with relu both": nine,
            "all without relu both": four,
            "batch fused with relu both": nine,
            "batch fused without relu both": four,
            "batch plain both": four,
        }
    }
    ours = iter((10.0, 40.0, 480.0))
    monkeypatch.setattr(
        timing, "time_cpu", lambda *_: {"ours": {"wall": next(ours)}, "eager": {"wall": 1.0}}
    )
    growing = [Case("instance", (1, 1, s, s)) for s in (8, 16, 32)]
    found = norms.growth(growing, Namespace(device="cpu", quick=True))
    assert found["largest_jump"]["ours"] == {"from": 256, "to": 1024, "relative": 3.0}


def test_moves(tmp_path: Path):
    pytest.importorskip("triton")
    out = tmp_path / "moves.json"
    done = run("benchmarks.moves", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = result(out)["moves"]
    assert rows
    for row in rows:
        assert row["forward"] >= row["forward_floor"] and row["backward"] >= row["backward_floor"]
        assert row["forward_kernels"] > 0 and row["backward_kernels"] > 0
        assert row["name"] in done.stdout


@pytest.mark.slow
def test_host(tmp_path: Path):
    pytest.importorskip("triton")
    out = tmp_path / "host.json"
    done = run("benchmarks.host", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    for row in result(out)["calls"]:
        assert row["not_found"] == [], "SPANS names a function that has gone"
        assert 1 <= row["forward"]["kernels"] < row["both"]["kernels"]
        assert 0 < row["forward"]["ours_us"] < row["both"]["ours_us"]
        assert row["both"]["torch_us"] > 0
        assert {"checks and reshaping", "autograd's backward"} <= row["parts_us"].keys()
        assert all(us > 0 for us in row["parts_us"].values())


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_step(device: str, tmp_path: Path):
    out = tmp_path / "step.json"
    done = run("benchmarks.step", "--quick", "--device", device, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = result(out)["steps"]
    assert [row["name"] for row in rows] == ["cyclegan", "resblock_gan"]
    for row in rows:
        assert {"ours", "unfused"} <= row["images_per_second"].keys()
        for who, parts in row["parts_ms"].items():
            assert parts.keys() == {"data", "G", "D", "rest", "EMA"}
            assert min(parts.values()) > 0 and row["images_per_second"][who] > 0


def test_a_wrong_network_is_named():
    first = {"ours": {"G": 1.0, "D": 2.0}, "unfused": {"G": 1.001, "D": 2.0}}
    assert not step.disagreement(first)
    first["ours"]["D"] = 2.2
    assert step.disagreement(first) == "ours: D is 2.2, unfused 2"
    first["ours"]["D"] = float("nan")
    assert "ours: D is nan" in step.disagreement(first)


def test_first_losses_are_losses():
    """And no shares, which bf16 may move by a whole value of few."""
    trained = step.Trained("ours", ["model=cyclegan", "model.width=8"], "cpu", synthetic=True)
    assert {"G_A", "D_A"} <= trained.first.keys()
    assert not [name for name in trained.first if name.startswith("balance/")]


@pytest.mark.parametrize("norm", ["instance", "batch", "conditional_batch", "group", "layer"])
def test_unfused_layers_compute_the_same(norm: str):
    """With every epilogue that the networks use, through the networks."""
    model = "resblock_gan" if norm == "conditional_batch" else "cyclegan"
    overrides = [f"model={model}", f"norm={norm}"]
    if model == "resblock_gan":
        overrides.append("model.block=postact")
    ours = step.Trained("ours", overrides, "cpu", synthetic=True)
    plain = step.Trained("unfused", overrides, "cpu", synthetic=True)
    kinds = [m for net in plain.task.networks.values() for m in net.modules()]
    assert any("forward" in vars(m) for m in kinds), "no norm was replaced"
    assert not step.disagreement({"ours": ours.first, "unfused": plain.first})


@pytest.mark.slow  # compiles a resnet50
def test_convert(tmp_path: Path):
    out = tmp_path / "convert.json"
    done = run("benchmarks.convert", "--quick", "--models", "resnet50", "--out", out)
    assert done.returncode == 0, done.stderr
    (row,) = result(out)["models"]
    assert row["model"] == "resnet50" and 0 < row["share_of_norms"] < 1
    assert min(row[f"{who}_ms"] for who in ("eager", "compiled", "ours")) > 0


@pytest.mark.slow
def test_sync(tmp_path: Path):
    out = tmp_path / "sync.json"
    done = run("benchmarks.sync", "--rounds", "3", "--out", out)
    assert done.returncode == 0, done.stderr
    found = result(out)
    assert min(found[f"{way}_us"] for way in ("whole", "apart", "shared")) > 0
