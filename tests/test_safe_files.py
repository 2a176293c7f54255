"""Files of strangers: nothing in them runs, and nothing is written outside of the run's folder."""

import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_loop import config
from test_sampling import named_run, photos, trained
from test_weights import refused

from gannorm.commands.sampling import sample
from gannorm.data.images import open_image
from gannorm.errors import RequestError
from gannorm.norms.cpu import build
from gannorm.study.members import members
from gannorm.study.runs import _run
from gannorm.training.loop import train

TRICKS = (
    ("../../x", "a/b", "/x", ".."), ("\x1b[2J\n", "nul\0", "x" * 4000, "C:\\x"),
    ("é" * 300, "é" * 301, "", "."), ("A", "a", "~", "$HOME"),
)  # fmt: skip


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return Path.touch, (self.trap,)


@pytest.fixture
def trap(tmp_path):
    """The file that a payload would make."""
    yield tmp_path / "trap"
    assert not (tmp_path / "trap").exists()


def spoiled(kind: str, path: Path, trap: Path) -> None:
    """A file with a payload, as torch saves it, or as its older formats and plain pickles are."""
    if kind == "zip":
        torch.save({"format": 1, "task": {}, "model.1.weight": Payload(trap)}, path)
    elif kind == "legacy":
        torch.save({"a": Payload(trap)}, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(trap)))
    else:  # an archive whose names lead out of it
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../trap", b"x")
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(trap)))


def test_the_payload_works(tmp_path):
    """Where code is allowed."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "works")))
    assert (tmp_path / "works").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "names"])
@pytest.mark.parametrize("name", ["latest_net_G_A.pth", "step_00000001.pt", "x.ckpt"])
def test_no_payload_of_a_file_of_weights_runs(kind, name, tmp_path, trap, capsys):
    path, run = tmp_path / name, tmp_path / "run"
    spoiled(kind, path, trap)
    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    for words in (
        ("sample", path, "--out", tmp_path / "out"),
        ("translate", path, image, tmp_path / "out", "--direction", "AtoB"),
        ("inspect", path),
        ("export", path, "--format", "safetensors", "--out", tmp_path / "out.safetensors"),
    ):
        assert str(path) in refused(capsys, *words)
    for key in ("resume", "init_from.path"):
        with pytest.raises(RequestError, match=name):
            train(config("cyclegan", f"{key}={path}"), run)
    assert {each.name for each in tmp_path.iterdir()} == {name, "image.png"}


def test_no_tag_of_a_runs_yaml_runs(tmp_path, trap):
    folder = tmp_path / "seed_0"
    (folder / ".hydra").mkdir(parents=True)
    call = f"!!python/object/apply:os.mkdir ['{trap}']"
    for text in (call, f"seed: {call}", f"seed: !!python/object/new:os.mkdir ['{trap}']"):
        (folder / ".hydra" / "config.yaml").write_text(text)
        with pytest.raises(RequestError, match="config.yaml is not what a run has written"):
            _run(next(iter(members().values())), 0, folder)


WRONG = [b"\xff\xfe", b"- a", b"seed: ${", b"{"]


SPOILT = [("summary.json", b"")]
SPOILT += [(name, each) for name in (".hydra/config.yaml", "summary.json") for each in WRONG]


@pytest.mark.parametrize("name,spoilt", SPOILT)
def test_what_a_run_has_written_and_was_damaged_is_named(name, spoilt, tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / name).write_bytes(spoilt)
    with pytest.raises(RequestError, match=f"{name} is not what a run has written"):
        _run(next(iter(members().values())), 0, tmp_path)


@pytest.mark.parametrize("header", ["pickle", "long", "far"])
def test_no_header_of_safetensors_runs_or_takes_memory(header, tmp_path, trap, capsys):
    path = tmp_path / "x.safetensors"
    tensor = '{"G.x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    body = {"pickle": pickle.dumps(Payload(trap)), "long": b"{}", "far": tensor.encode()}[header]
    length = 2**62 if header == "long" else len(body)
    path.write_bytes(struct.pack("<Q", length) + body)
    assert "is not a safetensors file" in refused(capsys, "inspect", path)


# ---- images


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_refused_by_name(tmp_path):
    for side in (30_000, 100_000, 2**31 - 1):
        (tmp_path / "bomb.png").write_bytes(bomb(side))
        with pytest.raises(RequestError, match=r"bomb\.png"):
            open_image(tmp_path / "bomb.png", 3)


def test_a_text_that_unpacks_to_a_gigabyte_is_refused_or_left_out(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    packed = zlib.compressobj(9)
    text = b"".join(packed.compress(bytes(2**20)) for _ in range(256)) + packed.flush()
    whole = stream.getvalue()
    place = whole.index(b"IDAT") - 4
    spoiled_ = whole[:place] + chunk(b"zTXt", b"Comment\0\0" + text) + whole[place:]
    (tmp_path / "text.png").write_bytes(spoiled_)
    try:
        assert open_image(tmp_path / "text.png", 3).size == (8, 8)
    except RequestError as error:
        assert "text.png" in str(error)


def test_metadata_is_not_run(tmp_path, trap):
    """EXIF, texts, colour profiles, several pictures in a file: the first one's pixels."""
    code, image = pickle.dumps(Payload(trap)), Image.new("RGB", (8, 8), (255, 0, 0))
    exif, texts = Image.Exif(), PngInfo()
    exif[0x010E], exif[0x9286], exif[0x0112] = "__import__('os')", code, 3
    texts.add_text("Comment", f"!!python/object/apply:os.mkdir ['{trap}']")
    texts.add_itxt("XML:com.adobe.xmp", "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>&e;")
    options = {"exif": exif, "icc_profile": code}
    image.save(tmp_path / "a.jpg", "JPEG", comment=code, **options)
    image.save(tmp_path / "b.png", "PNG", pnginfo=texts, **options)
    blue = Image.new("RGB", (8, 8), "blue")
    image.save(tmp_path / "c.mpo", "MPO", save_all=True, append_images=[blue], **options)
    image.save(tmp_path / "d.tiff", "TIFF", tiffinfo={270: "__import__('os')"}, **options)
    (tmp_path / "c.mpo").rename(tmp_path / "c.jpg")
    for name in ("a.jpg", "b.png", "c.jpg", "d.tiff"):
        red, green, blue_ = open_image(tmp_path / name, 3).resize((1, 1)).getpixel((0, 0))
        assert red > 240 and max(green, blue_) < 15, name


# ---- names


@pytest.mark.parametrize("names", TRICKS)
def test_no_class_name_of_a_checkpoint_leads_out_of_the_folder(names, tmp_path):
    """Names that no folder has, of a checkpoint that somebody made."""
    run, out = named_run(tmp_path / "in" / "run", list(names)), tmp_path / "in" / "out"
    before = set(tmp_path.rglob("*"))
    sample(run, seeds=[0], out=out)
    sample(run, grid=True, seeds=[0], out=out)
    made = set(tmp_path.rglob("*")) - before - {out}
    assert made == set(out_of(out)) and len(made) == len(names) + 1


def out_of(folder: Path) -> list[Path]:
    return list(folder.glob("*.png"))


def test_folders_of_odd_names_are_classes(tmp_path):
    names = ["x..", "a\x1b[2J", "-rf", "b\nc", "$(touch trap)", "é" * 100]
    root = photos(tmp_path / "photos", names)
    before = set(tmp_path.iterdir())
    trained(root, tmp_path / "run")
    sample(tmp_path / "run", seeds=[0], out=tmp_path / "out")
    assert len(out_of(tmp_path / "out")) == len(names)
    assert set(tmp_path.iterdir()) - before == {tmp_path / n for n in ("run", "out", "cache")}


# ---- compiled code


def test_the_folder_of_compiled_code_is_its_owners(tmp_path):
    before = os.umask(0)
    try:
        build.compile_to(tmp_path / "cache" / "cpu" / "x.so", ["true"])
    except OSError:
        pass  # which has compiled nothing
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "cpu").stat().st_mode & 0o777 == 0o700
