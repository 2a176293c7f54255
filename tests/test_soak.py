"""`python -m benchmarks.soak`: that it sees a leak where there is one; a short real one."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import soak

TOTAL = 300.0


def made_up(growth: float = 0.0, leaked: int = 0) -> soak.Life:
    """A life that warms up, with a bump each 20 s; growth: MB a second; leaked: files a minute."""
    seconds = [float(s) for s in range(int(TOTAL))]
    warm = [1000 * min(1.0, s / 40) + (8 if s % 20 == 0 else 0) for s in seconds]
    memory = [m + growth * s for m, s in zip(warm, seconds, strict=True)]
    files = [36 + leaked * int(s // 60) + (s % 17 == 0) for s in seconds]
    return soak.Life("cyclegan", 0.0, seconds, memory, files, [2] * len(seconds), (0, 900))


def test_what_is_flat_and_what_leaks():
    flat = soak.judged(made_up(), TOTAL)
    assert flat["flat"] and flat["descriptors"] == [36, 36, 36] and flat["spread"] == 0
    grown = soak.judged(made_up(growth=0.2), TOTAL)  # 30 MB from the first window to the last
    assert not grown["flat"] and 0.02 < grown["spread"] < 0.04
    leaking = soak.judged(made_up(leaked=1), TOTAL)
    assert not leaking["flat"] and leaking["spread"] == 0
    assert "NO" in soak.table([leaking]) and "NO" not in soak.table([flat])
    cut = made_up()
    cut.seconds, cut.memory, cut.descriptors = (
        cut.seconds[:90],
        cut.memory[:90],
        cut.descriptors[:90],
    )
    assert not soak.judged(cut, TOTAL)["flat"]  # nothing is known of its end


def test_a_process_and_its_workers_are_read(tmp_path):
    script = "import subprocess, sys; x = bytearray(50_000_000); open('/dev/null'); "
    script += "f = [open('/dev/null') for _ in range(7)]; "
    script += "subprocess.Popen(['sleep', '60']); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        life = soak.Life("cyclegan", 0.0)
        soak.read(life, process.pid, 1.0)
        (child,) = set(soak.tree(process.pid)) - {process.pid}
        files = len(os.listdir(f"/proc/{process.pid}/fd")) + len(os.listdir(f"/proc/{child}/fd"))
        os.kill(child, 9)
        process.stdin.close()
    assert life.processes == [2] and life.descriptors == [files] and files >= 13
    assert 50 < life.memory[0] < 90


@pytest.mark.slow
def test_a_minute(tmp_path):
    """Too short to be flat: each task lives once, ends as it should, is read and drawn."""
    out, plot = tmp_path / "soak.json", tmp_path / "soak.png"
    soak.main(["--minutes", "1.5", "--life", "45", "--out", str(out), "--plot", str(plot)])
    result = json.loads(out.read_text())
    assert [found["task"] for found in result["verdicts"]] == list(soak.TASKS)
    assert all(len(life["memory"].split()) > 20 for life in result["lives"])
    assert plot.stat().st_size > 10_000
