"""The tuning command writes bounds that the launchers go by."""

import json

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import Case
from gannorm import use_backend
from gannorm.errors import RequestError
from gannorm.kernels import launch
from gannorm.kernels.launch import Bounds
from gannorm.norms import functional as G

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
CASE = Case("instance", (2, 4, 16, 16), "relu")


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    """An empty table, and nothing of it left in the caches."""
    table: dict = {}
    monkeypatch.setattr(launch, "tuned", lambda: table)
    launch.forget()
    yield table
    launch.forget()


def test_the_table_decides_the_plan_of_its_kind_of_set_alone(no_table, monkeypatch):
    plans = []
    made = launch.plan

    def watched(*arguments):
        plans.append(made(*arguments))
        return plans[-1]

    monkeypatch.setattr(launch, "plan", watched)
    x = torch.randn(2, 4, 16, 16, device=DEVICE)
    with use_backend("triton"):
        expected = G.instance_norm(x)
        with tune.under(Bounds(0, 128, 4, 1.0), NAME, CASE):
            torch.testing.assert_close(G.instance_norm(x), expected)
            G.instance_norm(x[:, :, :8])
            G.instance_norm(x[:1])
        G.instance_norm(x)
    assert [p.persistent for p in plans] == [True, False, True, True, True]
    assert no_table == {NAME: {}}


def test_every_candidate_is_a_plan_of_its_own_and_the_formula_is_the_first():
    for case in tune.tuned_cases(quick=False):
        found = tune.candidates(case, 132)
        assert found[0] == launch.formula(tune._sets(case)[0])
        assert len(found) > 3


def test_no_bounds_are_tried_beyond_the_time_but_the_formulas():
    with use_backend("triton"):
        best, gain, _ = tune.tune(CASE, DEVICE, NAME, 0.01, within=0.0)
    assert best == launch.formula(False) and gain == 1.0


def test_a_wrong_plan_is_named_and_not_chosen(monkeypatch):
    found = iter(["", "dx off by 1", *[""] * 50])
    monkeypatch.setattr(tune.cases, "wrong", lambda *_: next(found))
    with use_backend("triton"):
        best, _, wrong = tune.tune(CASE, DEVICE, NAME, 0.0)
    assert len(wrong) == 1 and wrong[0].endswith("dx off by 1") and str(best) not in wrong[0]
    monkeypatch.setattr(tune.cases, "wrong", lambda *_: "y off by 1")
    with use_backend("triton"), pytest.raises(RuntimeError, match="y off by 1"):
        tune.tune(CASE, DEVICE, NAME, 0.0)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Interpreted times decide nothing, so that any gain is one here."""
    monkeypatch.setattr(tune, "GAIN", 0.0)
    out = tmp_path / "plans.json"
    tune.main(["--quick", "--out", str(out)])
    ((name, lines),) = json.loads(out.read_text()).items()
    assert name == NAME and list(lines) == ["sample 8 of 1x256 32 bits channels first"]
    assert list(lines) == [tune.key(CASE)]
    assert Bounds(*lines[tune.key(CASE)]) in tune.candidates(CASE, 132)
    assert "x the formula's speed" in capsys.readouterr().out


def test_times_are_compared_under_one_protocol(monkeypatch):
    """The formula's replay could not be measured: neither is the others' taken."""
    times = [{"wall": 60.0}] + [{"wall": 59.0, "graph_cold": 12.0}] * 50
    found = iter(times)
    monkeypatch.setattr(tune, "clocked", lambda *_: {"ours": next(found)})
    with use_backend("triton"):
        _, gain, _ = tune.tune(CASE, DEVICE, NAME, 0.0)
    assert gain == 60 / 59


def test_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="none was found"):
        tune.main([])
    with pytest.raises(RequestError, match="no case has this"):
        tune.main(["--quick", "--only", "nothing"])
