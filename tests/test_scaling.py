"""`python -m benchmarks.scaling`: its processes, what it counts, what it works out."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_benchmarks import result, run

from benchmarks import scaling, step
from benchmarks.processes import Group, Message, watched
from gannorm import parallel
from gannorm.tasks import build_task

GRADIENTS = {"kind": "all_reduce", "calls": 2.0, "bytes": 50e6}
POOLS = {"kind": "all_gather", "calls": 1.0, "bytes": 1e6}


def rank_and_threads() -> tuple[int, int, int]:
    return parallel.rank(), parallel.world(), torch.get_num_threads()


def raises() -> None:
    raise ValueError("no such thing")


def dies() -> None:
    if parallel.rank() == 1:
        os._exit(3)
    time.sleep(60)


def sends() -> Counter[Message]:
    with watched() as found:
        parallel.means([torch.ones(3), torch.ones(2, 2)])
        parallel.gathered(torch.ones(2, 5, dtype=torch.bfloat16))
        question = parallel.Question()
        question.ask(0)
        question.answer()
    parallel.means([torch.ones(9)])
    return found


@pytest.mark.slow
def test_processes_answer_and_what_they_send_is_seen():
    with Group(2) as group:
        assert group.call(rank_and_threads) == [(0, 2, 1), (1, 2, 1)]
        expected = Counter({
            Message("all_reduce", "float", 7): 1, Message("all_gather", "unsigned char", 20): 1,
            Message("all_reduce", "long int", 1): 1,
        })  # fmt: skip
        assert group.call(sends) == [expected, expected]
        with pytest.raises(RuntimeError, match="process . ended|process 1: the process died"):
            group.call(dies)
        assert not any(process.is_alive() for process in group.processes if process.join(10))


@pytest.mark.slow
def test_what_a_process_raises_and_one_that_is_silent():
    with Group(1, threads=2) as group:
        assert group.call(rank_and_threads) == [(0, 1, 2)]
        with pytest.raises(RuntimeError, match="process 0: ValueError: no such thing"):
            group.call(raises)
    with Group(1) as group:
        with pytest.raises(RuntimeError, match="no answer in 0 s"):
            group.call(time.sleep, 30, limit=0.1)


def test_the_time_of_a_ring():
    parts = {"gradients": GRADIENTS, "image pools": POOLS, "the agreement to stop": GRADIENTS}
    assert scaling.sending(parts, 1, "NVLink") == 0
    # 2 * 3/4 * 50 MB and 3 * 1 MB at 1.25 GB/s; 3 calls of 50 us.
    assert scaling.sending(parts, 4, "10 Gbit/s") == pytest.approx(0.06 + 0.0024 + 0.00015)


def test_projections_of_a_recipe():
    rates = {"sngan_cifar10 fp32": {"images_per_second": {"ours": 3200.0}}}
    found = scaling.projected("sngan_cifar10", {"gradients": GRADIENTS}, rates)
    assert found["step_seconds"] == pytest.approx(0.1)  # 5 + 0 batches of 64 images
    assert list(found["links"]["NVLink"]) == ["1", "2", "4", "8"]
    for rows in found["links"].values():
        assert rows["1"] == {"images_per_second": pytest.approx(3200), "efficiency": 1}
        shares = [row["efficiency"] for row in rows.values()]
        assert shares == sorted(shares, reverse=True)
    slow = found["links"]["10 Gbit/s"]["2"]
    assert slow["efficiency"] == pytest.approx(0.1 / (0.1 + 0.04 + 0.0001))
    assert slow["images_per_second"] == pytest.approx(2 * 3200 * slow["efficiency"])
    rows = {"1": {"efficiency": 1.0}, "2": {"efficiency": 0.6}, "4": {"efficiency": 0.4}}
    assert scaling.worth(rows) == "2, no more"
    assert scaling.worth({"1": {"efficiency": 1.0}, "2": {"efficiency": 0.6}}) == "2"


@pytest.mark.slow
def test_the_command(tmp_path: Path):
    """What is counted is what the networks are: their parameters, their channels, the images."""
    out = tmp_path / "scaling.json"
    done = run("benchmarks.scaling", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    found = result(out)
    assert "| measured | one process | two processes | ratio |" in done.stdout
    for name, overrides in scaling.cases(True).items():
        parts, cfg = found["counted"][name]["parts"], step.configured(*overrides)
        task = build_task(cfg, parallel.CPU, 10)
        parameters = [p for net in task.networks.values() for p in net.parameters()]
        learned = sum(p.numel() for p in parameters if p.requires_grad)
        updates = 1 + task.batches_per_step
        assert parts["gradients"]["calls"] == updates == 2
        assert parts["gradients"]["bytes"] == 4 * learned
        assert parts["the agreement to stop"] == {"kind": "all_reduce", "calls": 1, "bytes": 8}
        assert found["counted"][name]["log"]["calls"] == 2
        measured = found["measured"][name]
        one, two = (measured["first_losses"][way] for way in ("one", "several"))
        assert one == pytest.approx(two, rel=1e-4) and len(measured["ratios"]) == 1
    images = 2 * 3 * 32 * 32 * 4  # a batch of two
    pools = found["counted"]["cyclegan"]["parts"]["image pools"]
    assert pools == {"kind": "all_gather", "calls": 2, "bytes": 2 * images}
    # 7 norms of 8 channels, in D's step and in G's; backward in G's alone.
    norms = found["counted"]["resblock_gan"]["parts"]
    assert norms["norms, forward"] == {
        "kind": "all_gather", "calls": 14, "bytes": 14 * 8 * (2 * 8 + 1)
    }  # fmt: skip
    assert norms["norms, backward"] == {"kind": "all_reduce", "calls": 7, "bytes": 7 * 16 * 8}


def test_the_results_in_the_documentation_are_those_on_disk():
    """docs/scaling.md has the tables that the newest JSON gives."""
    newest = sorted(scaling.timing.RESULTS.glob("scaling-*.json"))[-1]
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for line in scaling.told(json.loads(newest.read_text(encoding="utf-8"))).splitlines():
        assert line in text or not line.startswith("| ")
