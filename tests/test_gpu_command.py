"""`python -m benchmarks.gpu`: rehearsed as a whole, killed, hung, and with a wrong kernel."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from mutants import MUTANTS, copy, mutated

from benchmarks import cases, timing
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, engine, right, several, stages, table
from benchmarks.processes import Message
from gannorm.errors import RequestError

ROOT = Path(__file__).resolve().parents[1]


def start(out: Path, *options: str, root: Path = ROOT) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out), *options]
    env = {**os.environ, "PYTHONPATH": str(root)}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=root, env=env, stdout=pipe, stderr=pipe, text=True)


def stage(out: Path, name: str) -> dict:
    found = json.loads((out / f"{name}.json").read_text())
    assert found["stage"] == name and found["versions"]["torch"] == torch.__version__
    return found


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("gpu")
    process = start(out)
    text, errors = process.communicate()
    assert process.returncode == 0, text + errors[-3000:]
    return out, text


@pytest.mark.slow
def test_every_stage_is_rehearsed(rehearsed):
    out, text = rehearsed
    context = stages.Context(out, True)
    for each in stages.STAGES:
        found = stage(out, each.name)
        assert list(found["items"]) and set(found["items"]) == set(each.items(context))
        assert found["failed"] == {} and found["not_reached"] == []
        assert not any(result.get("wrong") for result in found["items"].values())
        assert f"\n{each.name}: {len(found['items'])} done" in text or each.name == "right"
    assert (out / "summary.txt").read_text().strip() in text
    assert json.loads((out / "summary.json").read_text())["stages"].keys() == set(command.NAMES)
    assert timing.read(out / "plans.json")
    assert (out / "run" / "cyclegan" / "summary.json").exists()
    for way in ("one", "two"):
        summary = json.loads((out / "processes" / f"cyclegan-{way}" / "summary.json").read_text())
        assert summary["steps"] == several.COMPARED
    assert "images/s, on two processes" in text


@pytest.mark.slow
def test_every_value_of_every_factor_is_rehearsed(rehearsed):
    names = stage(rehearsed[0], "right")["items"]
    others = {name for name in names if name.startswith(stages.PUBLISHED)} | checks.ITEMS.keys()
    met = {word for name in names if name not in others for word in name.split()}
    factors = (right.NORMS, right.DTYPES, right.LAYOUTS, right.PLANS, right.EPILOGUES)
    assert met == {value for factor in factors for value in factor}
    assert others <= names.keys() and len(others) > len(checks.ITEMS)


def test_combinations():
    every = right.combinations()
    assert len(set(every)) == len(every) == 7 * 4 * 4 * 3 * 7 + 4 * 4 * 4 * 7
    assert {c[:1] + c[3:4] for c in every[:25]} == {c[:1] + c[3:4] for c in every}
    pairs = {(i, j, c[i], c[j]) for c in every for i in range(5) for j in range(i)}
    early = {(i, j, c[i], c[j]) for c in every[:350] for i in range(5) for j in range(i)}
    assert early == pairs


@pytest.mark.parametrize("part", ["y", "running var", "dweight", "dresidual"])
def test_each_part_of_an_answer_is_judged(part):
    c = right.Combination("batch", epilogue="residual+relu")
    t = right.inputs(c, (4, 4, 5, 3), "cpu")
    expected = right.oracle(c, t)
    grads = dict(expected.grads)
    exact = expected._replace(inner=None)
    assert right.faults(c, exact, expected) == ""
    if part.startswith("d"):
        grads[part[1:]] = grads[part[1:]] * 1.001
        changed = exact._replace(grads=grads)
    else:
        name = part.split()[-1]
        changed = exact._replace(**{name: getattr(exact, name) * 1.001})
    assert right.faults(c, changed, expected).startswith(f"{part} off by ")
    lost = exact._replace(y=exact.y * float("nan"))
    assert "y off by nan" in right.faults(c, lost, expected)


WORKER = """
import os, signal, sys, time
from benchmarks.gpu import engine

def run(name):
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "leaves":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    if name == "raises":
        raise ValueError("no such thing")
    if name == "spoils":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    print("noise")
    return {"wrong": "y off by 1" if name == "wrong" else "", "process": os.getpid()}

engine.serve(run)
"""


@pytest.mark.slow
def test_what_befalls_a_worker_costs_its_item_alone(tmp_path: Path):
    names = ["fine", "dies", "leaves", "hangs", "raises", "spoils", "wrong", "last"]
    report = engine.Report("right", tmp_path / "right.json", {"device": "none"})
    line = [sys.executable, "-c", WORKER]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    engine.run_stage(report, names, line, env, 1, time.monotonic() + 60, 1.0)
    assert report.failed == {
        "dies": "the process died: signal 9",
        "leaves": "the process ended: 3",
        "hangs": "no answer in 1 s",
        "raises": "ValueError: no such thing",
        "spoils": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert list(report.items) == ["fine", "wrong", "last"] and report.not_reached == []
    assert report.wrong == {"wrong": "y off by 1"}
    assert report.items["wrong"]["process"] == report.items["last"]["process"]
    written = json.loads(report.path.read_text())
    assert written["items"] == report.items and written["device"] == "none"


def test_the_end_of_a_stages_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "GRACE", 0.5)
    report = engine.Report("right", tmp_path / "right.json", {})
    line = [sys.executable, "-c", WORKER]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    engine.run_stage(report, ["hangs", "fine"], line, env, 1, time.monotonic() + 1, 30.0)
    assert report.failed == {"hangs": "cut off at the end of the stage's time"}
    assert report.not_reached == ["fine"] and report.items == {}
    assert report.faults == {} and command.needed(report) == {}
    report.stage = "run"  # whose items are few: each is wanted
    assert command.needed(report).keys() == {"hangs", "fine"}


def test_a_worker_that_does_not_begin_is_cut_off_too(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(engine, "GRACE", 0.1)
    report = engine.Report("right", tmp_path / "right.json", {})
    line = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    engine.run_stage(report, ["a", "b"], line, dict(os.environ), 1, began + 0.3, 30.0)
    assert time.monotonic() - began < 10
    assert report.failed == {"a": engine.CUT_OFF} and report.not_reached == ["b"]


def test_what_a_killed_worker_started_ends_with_it(tmp_path: Path):
    """Such as a loader's processes: they hold the pipe that the answers come through."""
    code = (
        "import os, subprocess, sys; print('ready', flush=True); "
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); os.kill(os.getpid(), 9)"
    )
    report = engine.Report("right", tmp_path / "right.json", {})
    engine.run_stage(
        report, ["a"], [sys.executable, "-c", code], dict(os.environ), 1, time.monotonic() + 30, 2.0
    )  # fmt: skip
    assert report.failed.keys() == {"a"}
    until = time.monotonic() + 10
    while _alive(int((tmp_path / "pid").read_text())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(int((tmp_path / "pid").read_text()))


def _alive(number: int) -> bool:
    stat = Path(f"/proc/{number}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_fault_of_the_command_itself_ends_its_stage(tmp_path: Path, monkeypatch):
    report = engine.Report("right", tmp_path / "right.json", {})

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(engine, "_Worker", full)
    with pytest.raises(OSError, match="no space left"):
        engine.run_stage(report, ["a"], [], {}, 1, time.monotonic() + 30, 1.0)


def workers(out: Path) -> list[int]:
    """Processes that work for `out`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--worker" in words and str(out).encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_at_any_point_it_leaves_valid_results(tmp_path: Path):
    process = start(tmp_path, "--stages", "right")
    path = tmp_path / "right.json"
    while len(timing.read(path).get("items", {})) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert workers(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = stage(tmp_path, "right")
    assert len(found["items"]) >= 3 and found["not_reached"]
    until = time.monotonic() + 20
    while workers(tmp_path) and time.monotonic() < until:
        time.sleep(0.2)
    assert not workers(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="POSIX signals")
def test_interrupted_it_says_what_there_is(tmp_path: Path):
    process = start(tmp_path, "--stages", "right")
    while len(timing.read(tmp_path / "right.json").get("items", {})) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # which becomes what SIGINT is
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "\nright: " in text and "not reached" in text
    assert not workers(tmp_path)


def test_requests_that_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="no GPU was found; --rehearse"):
        command.main(["--out", str(tmp_path)])
    with pytest.raises(RequestError, match="--stages slow: unknown; choose from right, run"):
        command.main(["--rehearse", "--stages", "slow,right", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_run_of_an_earlier_command_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from benchmarks.gpu import whole

    class Trained(Exception):
        pass

    def train(raw: object, folder: Path) -> None:
        raise Trained(folder.exists())

    monkeypatch.setattr(whole, "train", train)
    (tmp_path / "run" / "cyclegan" / "checkpoints").mkdir(parents=True)
    with pytest.raises(Trained, match="False"):
        whole.run_run("cyclegan", stages.Context(tmp_path, True))


def test_without_hydra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    timing.write({"a card": {}}, tmp_path / "plans.json")  # of an earlier `tuned`, for this `step`
    asked = ["--rehearse", "--stages", "step,run", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    assert timing.read(tmp_path / "plans.json")
    for name in ("run", "step"):
        assert "hydra-core is not installed" in stage(tmp_path, name)["items"]["all"]["skipped"]
    assert capsys.readouterr().out.count("skipped: hydra-core is not installed; pip install") == 2


def test_two_processes_take_two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where there is one, the stage says so, costs the others no time, and is no failure."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = Namespace(rehearse=False, minutes=1.0)
    report = engine.Report("processes", tmp_path / "processes.json", {})
    command.run_all([report], asked, stages.Context(tmp_path, False))
    assert report.items == {"all": {"skipped": command.ONE_GPU}}
    assert report.wrong == {} and command.needed(report) == {}
    told = table.table([report], {"device": "a card", "versions": {"torch": "1", "triton": "2"}},
                       stages.Context(tmp_path, False))  # fmt: skip
    assert told.splitlines()[2:] == [
        "processes: 0 done, 0 wrong, 1 skipped, 0 s", f"    skipped: {command.ONE_GPU}"
    ]  # fmt: skip
    assert command.skipped(stages.STAGES[-1], Namespace(rehearse=True)) is None


def test_what_two_processes_get_wrong():
    c = right.Combination("batch", "fp64", epilogue="leaky_relu")
    t, expected = right.asked(c, (4, 4, 5, 3), "cpu")
    whole = right.answer(c, t)
    gather, reduce = (Counter([Message(k, "double", 9)]) for k in ("all_gather", "all_reduce"))

    def part(own: slice, share: float, **changed: object) -> several.Part:
        """A process's part of the answer, and its share of the table's gradient."""
        dx, dw, db = (whole.grads[name] for name in ("x", "weight", "bias"))
        grads = {"x": dx[own], "weight": share * dw, "bias": share * db}
        answer = whole._replace(y=whole.y[own], grads=grads)
        return several.Part(answer, gather, reduce)._replace(**changed)

    first, last = part(slice(3), 0.7), part(slice(3, 4), 0.3)
    assert several.wrong(c, [first, last], expected, whole) == ""
    again = part(slice(3, 4), 0.4)
    assert several.wrong(c, [first, again], expected, whole).startswith("dweight off by 1.0e-01")
    swapped = several.wrong(c, [part(slice(2), 0.7), part(slice(2), 0.3)], expected, whole)
    assert "y off by" in swapped and "dx off by" in swapped and "not one GPU's: y off" in swapped
    moved = last._replace(answer=last.answer._replace(var=whole.var + 1e-9))
    assert several.wrong(c, [first, moved], expected, whole) == (
        "running var differs between the processes"
    )
    silent, twice = first._replace(backward=Counter()), last._replace(forward=gather + gather)
    assert several.wrong(c, [silent, twice], expected, whole) == (
        "backward process 0 sends nothing; forward process 1 sends 2 all_gather"
    )


def test_goals(tmp_path: Path):
    """What the table says of a goal, and what is tuned, from the times of a run."""

    def entry(case: cases.Case, mine: float, percent: float) -> dict:
        times = {"ours": mine, "eager": 30.0, "compile": 14.0, "flag-gems": 11.0}
        return {
            "direction": "both",
            "times_us": {who: {"wall": t, "graph_cold": t} for who, t in times.items()},
            "percent_of_copy": {"ours": {"wall": 1.0, "graph_cold": percent}},
        }

    met, slow, open_, _ = stages.GOALS
    third = cases.Case("instance", (1, 64, 256, 256), "relu")
    items = {
        str(met): {"entries": [entry(met, 10.0, 93.0)]},
        str(slow): {"entries": [entry(slow, 11.5, 91.0)]},
        str(third): {"entries": [entry(third, 10.0, 40.0)]},
    }
    report = engine.Report("fast", tmp_path / "fast.json", {}, items)
    report.write()
    assert table.verdict(str(met), report).startswith(f"met  {met}: 93% of copy, eager 3.00x")
    assert table.verdict(str(slow), report).startswith("MISSED")  # behind a peer
    assert table.verdict(str(open_), report) == f"OPEN  {open_}: not timed"
    alone, beside = entry(open_, 10.0, 95.0), entry(open_, 12.0, 95.0)
    del alone["times_us"]["flag-gems"], alone["times_us"]["compile"]
    del beside["times_us"]["compile"]
    items[str(open_)] = {"entries": [alone]}
    expected = f"OPEN  {open_}: 95% of copy, eager 3.00x, compile not timed"
    assert table.verdict(str(open_), report) == expected
    items[f"{stages.PEERS}{open_}"] = {"entries": [beside]}
    found = table.verdict(str(open_), report)
    assert found.startswith("MISSED") and "flag-gems 0.92x" in found
    context = stages.Context(tmp_path, False)
    assert stages.tuned_items(context) == [str(third)]
    text = table.table([report], {"device": "a card", "versions": {"torch": "1", "triton": "2"}},
                       context)  # fmt: skip
    assert "a card; torch 1, triton 2" in text and f"40% of copy: {third}" in text


@pytest.mark.slow
def test_a_wrong_kernel_is_named_and_ends_nothing(tmp_path: Path):
    mutant = next(m for m in MUTANTS if m.name == "no x_hat term in dx")
    root = copy(tmp_path)
    path = root / mutant.file
    path.write_text(mutated(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
    out = tmp_path / "out"
    process = start(out, root=root)
    text, errors = process.communicate()
    assert process.returncode == 1, errors[-3000:]
    wrong = json.loads((out / "summary.json").read_text())["stages"]["right"]["wrong"]
    assert "dx off by" in wrong["batch fp32 nchw persistent none"]
    assert "batch fp32 nchw split none" not in wrong
    assert "WRONG batch fp32 nchw persistent none: dx off by" in text
    for name in command.NAMES[1:]:
        found = stage(out, name)
        assert found["items"] or found["failed"], name
    assert not stage(out, "run")["failed"] and not stage(out, "step")["failed"]
