"""What a run shows arrives whole, in TensorBoard and in files; a resume drops what lies beyond."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gannorm.training.monitor import Monitor


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def board(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(run_dir, name):
    return [(e.step, pytest.approx(e.value)) for e in board(run_dir).Scalars(name)]


def grey(levels, size):
    """Images (N, 3, size, size), each of one 8-bit level."""
    x = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, size, size)
    return x / 127.5 - 1


def test_scalars_and_text_arrive(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.scalars(1, {"loss/G": 0.5, "lr/G": 1e-4})
    monitor.scalars(2, {"loss/G": 0.25})
    expected = [{"step": 1, "loss/G": 0.5, "lr/G": 1e-4}, {"step": 2, "loss/G": 0.25}]
    assert lines(tmp_path) == expected  # on disk at once
    monitor.text("config", "seed: 0")
    monitor.close()
    assert lines(tmp_path) == expected
    assert scalars(tmp_path, "loss/G") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path, "lr/G") == [(1, 1e-4)]
    (text,) = board(tmp_path).Tensors("config/text_summary")
    assert text.tensor_proto.string_val[0] == b"seed: 0"


def test_grids(tmp_path):
    """Sizes and pixels, in the file and in TensorBoard: 32-pixel images three times as large."""
    monitor = Monitor(tmp_path, 0)
    samples = {"wide": (grey([0, 51, 102, 153, 204, 255], 32), 3), "tall": (grey([10] * 6, 96), 2)}
    path = monitor.images(20, samples)
    monitor.close()
    assert path == tmp_path / "samples" / "step_00000020.png"
    picture = np.array(Image.open(path))
    # Columns of 100 pixels and 4 around; 16 between the grids.
    assert picture.shape == (304, 304 + 16 + 204, 3)
    for row in range(2):
        for column in range(3):
            tile = picture[4 + 100 * row : 100 + 100 * row, 4 + 100 * column : 100 + 100 * column]
            assert (tile == 51 * (3 * row + column)).all()
    assert (picture[204:, :304] == 255).all() and (picture[:, 304:320] == 255).all()
    assert (picture[:4] == 255).all() and (picture[:, 100:104] == 255).all()
    assert (picture[204:300, 324:420] == 10).all()
    (wide,), (tall,) = (board(tmp_path).Images(f"samples/{name}") for name in samples)
    assert wide.step == tall.step == 20
    for event, part in ((wide, picture[:204, :304]), (tall, picture[:, 320:])):
        shown = np.array(Image.open(io.BytesIO(event.encoded_image_string)), dtype=int)
        assert np.abs(shown - part).max() <= 1  # TensorBoard rounds down


def test_enlarging_keeps_pixels_apart(tmp_path):
    image = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand(2, 1, 2, 2)
    path = Monitor(tmp_path, 0).images(0, {"grid": (image, 2)})
    tile = np.array(Image.open(path))[4:100, 4:100, 0]
    assert (tile[:48, :48] == 0).all() and (tile[:48, 48:] == 255).all()
    assert (tile[48:, :48] == 255).all() and (tile[48:, 48:] == 0).all()


@pytest.mark.parametrize(
    "n,channels,size", [(1, 3, 32), (3, 1, 8), (2, 3, 200), (5, 3, 96), (1, 1, 1)]
)
def test_any_number_size_and_colour(tmp_path, n, channels, size):
    """Out of range values are clamped, not wrapped around."""
    monitor = Monitor(tmp_path, 0)
    dark, light = torch.full((n, channels, size, size), -7.0), torch.full((2, 3, 4, 4), 7.0)
    picture = np.array(Image.open(monitor.images(1, {"a": (dark, 2), "b": (light, 2)})))
    monitor.close()
    assert picture.ndim == 3 and set(np.unique(picture)) == {0, 255}
    tile = max(1, 96 // size) * size
    black = n * tile * tile
    assert int((picture == 0).all(2).sum()) == black


def test_resume_drops_exactly_what_lies_beyond(tmp_path):
    monitor = Monitor(tmp_path, 0)
    for step in range(1, 8):
        monitor.scalars(step, {"loss/G": step / 8, "step/s": float(step)})
        monitor.scalars(step, {"quality/accuracy": step / 16})
    monitor.close()
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:10]
    path.write_text(path.read_text() + '{"step": 8, "loss/')  # cut short by the crash

    monitor = Monitor(tmp_path, 5)
    assert path.read_text() == "".join(kept)
    monitor.scalars(6, {"loss/G": 9.0})
    monitor.close()
    assert path.read_text() == "".join(kept) + '{"step": 6, "loss/G": 9.0}\n'
    assert scalars(tmp_path, "loss/G") == [(k, k / 8) for k in range(1, 6)] + [(6, 9.0)]
    assert scalars(tmp_path, "quality/accuracy") == [(k, k / 16) for k in range(1, 6)]


def test_a_figure_is_told_once_where_a_process_begins(tmp_path):
    """By the process that was killed there, or by this one; in both places."""
    for start in (0, 3, 3):
        monitor = Monitor(tmp_path, start)
        monitor.scalars(start, {"floor": 0.5}, protocol="p")
        monitor.scalars(start, {"floor": 0.5, "x": float(start)})
        monitor.scalars(start + 3, {"floor": 0.5, "x": start + 3.0})
        monitor.close()
    found = [(line["step"], line.get("floor"), line.get("x")) for line in lines(tmp_path)]
    assert found == [(0, 0.5, None), (0, None, 0), (3, 0.5, 3), (6, 0.5, 6)]
    assert scalars(tmp_path, "floor") == [(0, 0.5), (3, 0.5), (6, 0.5)]
    assert scalars(tmp_path, "x") == [(0, 0), (3, 3), (6, 6)]


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_goes_back_keeps_the_step(step, tmp_path):
    monitor = Monitor(tmp_path, 0)
    for k in range(5):
        monitor.scalars(k, {"x": k / 8})
    monitor.restart(step)
    monitor.scalars(step + 1, {"x": 9.0})
    monitor.close()
    expected = [(k, k / 8) for k in range(step + 1)] + [(step + 1, 9.0)]
    assert [(line["step"], line["x"]) for line in lines(tmp_path)] == expected
    assert scalars(tmp_path, "x") == expected


@pytest.mark.parametrize("tail", ['{"step": 3', '{"step": 3, "x": 1}', "\0\0\0\0", "{", '{"ste'])
def test_a_last_line_cut_short_goes(tmp_path, tail):
    """Even a whole one without its line end would swallow the next line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "x": 1}\n' + tail)
    monitor = Monitor(tmp_path, 2)
    monitor.scalars(3, {"x": 2.0})
    monitor.close()
    assert lines(tmp_path) == [{"step": 2, "x": 1}, {"step": 3, "x": 2.0}]


def test_a_kill_at_any_byte(tmp_path):
    """Of the last lines: a continuation at a step has each line up to it once, and no other."""
    monitor = Monitor(tmp_path, 0)
    for step in range(1, 4):
        monitor.scalars(step, {"x": step / 2})
    monitor.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole) + 1):
        for start in (1, 2):
            path.write_bytes(whole[:length])
            monitor = Monitor(tmp_path, start)
            monitor.scalars(start + 1, {"x": 9.0})
            monitor.close()
            there = [k for k in range(1, start + 1) if whole[:length].count(b"}") >= k]
            assert [line["step"] for line in lines(tmp_path)] == [*there, start + 1]
            for events in tmp_path.glob("events*"):
                events.unlink()


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n{"step": 2, "x": 1}')
    monitor = Monitor(tmp_path, 2)
    monitor.scalars(3, {"x": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_nothing_half_written_is_left(tmp_path):
    for step in (0, 2):
        monitor = Monitor(tmp_path, step)
        monitor.scalars(step + 1, {"x": 1.0})
        monitor.images(step + 1, {"a": (grey([7], 4), 1)})
        monitor.close()
    names = {p.name for p in tmp_path.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert names == {"metrics.jsonl", "step_00000001.png", "step_00000003.png"}


def test_notes_stand_beside_the_figures_in_the_file_alone(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.scalars(1, {"quality/fid": 2.0}, protocol={"generated": 360})
    monitor.close()
    assert lines(tmp_path) == [{"step": 1, "quality/fid": 2.0, "protocol": {"generated": 360}}]
    assert scalars(tmp_path, "quality/fid") == [(1, 2.0)]
