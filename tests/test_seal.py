"""Any changed or missing byte of a checkpoint is found, before torch reads it."""

import random
import warnings
import zipfile

import pytest
import torch
from test_inference import TRANSLATION, make_run, refused

from benchmarks.checkpoint import cost, default_cyclegan
from gannorm.errors import RequestError
from gannorm.training import checkpoint, weights

SMALL = {"x": torch.arange(5.0), "none": torch.empty(0), "config": {"a": 1, "b": "c"}}


@pytest.fixture
def never_read(monkeypatch):
    """torch.load is not called."""

    def load(*arguments, **options):
        pytest.fail("torch has read a damaged file")  # which no `except Exception` catches

    monkeypatch.setattr(torch, "load", load)


def fault(path) -> str:
    with pytest.raises(checkpoint.DamagedError) as info:
        checkpoint.load(path)
    return str(info.value)


def found_everywhere(path, places, flips) -> None:
    """With any of the places changed, the file is refused by its name; it is whole again then."""
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in places:
            file.seek(place)
            file.write(bytes([whole[place] ^ next(flips)]))
            assert str(path) in fault(path)
            file.seek(place)
            file.write(whole[place : place + 1])
    assert path.read_bytes() == whole


def truncated_everywhere(path, lengths) -> None:
    whole = path.read_bytes()
    for length in lengths:
        path.write_bytes(whole[:length])
        assert str(path) in fault(path)
    path.write_bytes(whole)


def bits(rng):
    while True:
        yield 1 << rng.randrange(8)


def test_every_byte(tmp_path, never_read):
    path = tmp_path / "x.pt"
    checkpoint.save(path, SMALL)
    found_everywhere(path, range(path.stat().st_size), bits(random.Random(0)))


def test_every_length(tmp_path, never_read):
    path = tmp_path / "x.pt"
    checkpoint.save(path, SMALL)
    truncated_everywhere(path, range(0, path.stat().st_size, 3))
    whole = path.read_bytes()
    for more in (b"\0", b"x" * 79, whole[-79:], whole):  # nor is anything to be behind it
        path.write_bytes(whole + more)
        assert str(path) in fault(path)
    zeros = bytearray(whole)  # a hole, as a power cut leaves
    zeros[512:1024] = bytes(512)
    path.write_bytes(zeros)
    assert str(path) in fault(path)


def test_a_default_checkpoint_at_60_places(tmp_path, never_read):
    path, rng = tmp_path / "x.pt", random.Random(0)
    checkpoint.save(path, default_cyclegan())
    size = path.stat().st_size
    assert size > 10e6
    found_everywhere(path, [rng.randrange(size) for _ in range(60)], bits(rng))
    truncated_everywhere(path, [rng.randrange(size) for _ in range(10)])


@pytest.mark.slow
def test_every_997th_byte_of_a_default_checkpoint(tmp_path, never_read):
    path, rng = tmp_path / "x.pt", random.Random(0)
    checkpoint.save(path, default_cyclegan())
    size = path.stat().st_size
    found_everywhere(path, range(0, size, 997), bits(rng))
    truncated_everywhere(path, [size * k // 100 for k in range(100)])


def test_torch_and_zip_read_it(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, SMALL)
    assert torch.equal(torch.load(path)["x"], SMALL["x"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"gannorm sha256 ")


def test_the_checksums_are_there_whatever_torch_is_told(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint.save(tmp_path / "x.pt", SMALL)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.load(tmp_path / "x.pt")["config"] == SMALL["config"]


def test_a_checkpoint_of_format_1(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"format": 1, **SMALL}, path)
    assert checkpoint.load(path)["config"] == SMALL["config"]
    whole = path.read_bytes()
    place = whole.index(SMALL["x"].numpy().tobytes())
    found_everywhere(path, range(place, place + 20), bits(random.Random(0)))
    assert "checksum of x/data/" in fault_at(path, whole, place)


def fault_at(path, whole: bytes, place: int) -> str:
    damaged = bytearray(whole)
    damaged[place] ^= 4
    path.write_bytes(damaged)
    return fault(path)


def test_versions(tmp_path):
    torch.save({"format": 3, **SMALL}, tmp_path / "new.pt")
    with pytest.raises(RequestError, match=r"newer gannorm \(format 3; this one reads up to 2\)"):
        checkpoint.load(tmp_path / "new.pt")
    torch.save({"format": 2, **SMALL}, tmp_path / "bare.pt")  # a digest that was taken off
    assert "its digest is gone" in fault(tmp_path / "bare.pt")


def test_weights_of_others(tmp_path, capsys):
    """init_from and the commands look at their checksums too."""
    run = make_run(tmp_path / "run", TRANSLATION, None)
    path, state = tmp_path / "latest_net_G_A.pth", run.task.generators["G_A"].state_dict()
    torch.save(state, path)
    assert weights.read(path).networks.keys() == {"G_A"}
    whole, first = path.read_bytes(), next(iter(state.values()))
    damaged = bytearray(whole)
    stored = first.permute(0, 2, 3, 1).contiguous().numpy().tobytes()  # channels last
    damaged[whole.index(stored[:64]) + 5] ^= 1
    path.write_bytes(damaged)
    assert f"{path} is damaged: the checksum of" in refused(capsys, "inspect", path)
    torch.save(state, path, _use_new_zipfile_serialization=False)  # has no checksums
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert weights.read(path).networks.keys() == {"G_A"}


def test_the_benchmark_counts_what_is_written(tmp_path):
    found = cost({"x": torch.zeros(250_000)}, tmp_path / "x.pt", 3)
    assert found["MB"] == pytest.approx(1.0, rel=0.01)
    assert 0 < found["seal"] < found["save"] and 0 < found["check"] < found["load"]
