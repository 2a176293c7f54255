"""`python -m benchmarks.growth`: that it sees a step where there is one; a real, small run."""

from pathlib import Path

import pytest
from test_benchmarks import result

from benchmarks import growth


def made_up(milliseconds: list[float]) -> list[growth.Point]:
    """Of batches that double, 100 MB and 1 MB an image."""
    return [
        {"batch": 2**k, "size": 10, "pixels": 100 * 2**k, "milliseconds": ms,
         "megabytes": 100 + 2**k, "peak_megabytes": 500.0}
        for k, ms in enumerate(milliseconds)
    ]  # fmt: skip


def test_a_line_is_found():
    found = growth.judged(made_up([3.0 + 2.0 * 2**k for k in range(7)]))
    time, memory = found["milliseconds"], found["megabytes"]
    assert time["fixed"] == pytest.approx(3) and time["per_megapixel"] == pytest.approx(2e4)
    assert memory["fixed"] == pytest.approx(100) and memory["per_megapixel"] == pytest.approx(1e4)
    assert time["r2"] == memory["r2"] == pytest.approx(1) and time["smooth"] and memory["smooth"]
    assert time["relative"] == pytest.approx((3 + 128) / (3 + 64) / 2)


def test_a_step_is_found():
    found = growth.judged(made_up([1.0, 2.0, 4.0, 10.5, 21.0]))["milliseconds"]
    assert found["relative"] == pytest.approx(10.5 / 4 / 2) and not found["smooth"]
    assert found["where"] == "4x10x10 to 8x10x10" and found["r2"] < 1
    assert growth.judged(made_up([1.0, 2.0, 4.0, 10.3]))["milliseconds"]["smooth"]


def test_the_points():
    """Both rows of a CycleGAN span the same numbers of pixels."""
    over = {s.name: [b * n * n for b, n in map(s.at, s.values)] for s in growth.SERIES}
    batch, size, other = over.values()
    assert (batch[0], batch[-1]) == (size[0], size[-1]) == (64**2, 512**2)
    assert all(pixels == sorted(pixels) and len(pixels) == 7 for pixels in (batch, size, other))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """All but the processes, which take a while to start."""
    monkeypatch.setattr(growth, "alone", lambda *arguments: growth.point(arguments[0], 1, 0.0))
    out, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    assert growth.main(["--quick", "--out", str(out), "--plot", str(plot)]) == 0
    found, told = result(out), capsys.readouterr().out
    assert [each["name"] for each in found["series"]] == [each.name for each in growth.SERIES]
    for series in found["series"]:
        assert [p["steps"] for p in series["points"]] == [growth.FEW, growth.FEW]
        assert all(p["milliseconds"] > 0 and p["peak_megabytes"] > 100 for p in series["points"])
        assert series["judged"]["milliseconds"]["relative"] > 0 and series["name"] in told
    assert plot.stat().st_size > 10_000


@pytest.mark.slow
def test_the_memory_of_a_point_is_its_own():
    """In a process of its own; 512 images take more than one."""
    small = growth.quick(growth.SERIES[2])
    few, many, again = (growth.measured(small, n, 0.0) for n in (1, 512, 1))
    assert many["megabytes"] > few["megabytes"] + 20
    assert abs(again["megabytes"] - few["megabytes"]) < 10
