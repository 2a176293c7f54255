"""Files of every kind become 8-bit grey or RGB as a viewer shows them; 8 bits survive a round trip.

Damaged files are refused by name.
"""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from gannorm.data.images import list_images, open_image, to_image, to_tensor
from gannorm.errors import RequestError

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
RAMP_8BIT = np.round(RAMP.astype(np.float64) / 257)  # 65535 = 255 * 257
COLOURS = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def write_png16(path, array: np.ndarray) -> None:
    """A 16-bit RGB PNG, which Pillow cannot write: array (H, W, 3) uint16."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def pixels(path, channels: int = 3) -> np.ndarray:
    return np.array(open_image(path, channels))


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_range(tmp_path, kind):
    Image.fromarray(RAMP).save(tmp_path / f"ramp.{kind}")
    read = pixels(tmp_path / f"ramp.{kind}", 1)
    assert np.abs(read - RAMP_8BIT).max() == 0
    rgb = pixels(tmp_path / f"ramp.{kind}", 3)
    assert rgb.shape == (256, 256, 3) and (rgb == read[..., None]).all()


def test_big_endian_16_bit_keeps_its_range(tmp_path):
    image = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    image.save(tmp_path / "ramp.tif")
    assert (pixels(tmp_path / "ramp.tif", 1) == RAMP_8BIT).all()


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_dark_16_bit_stays_dark(tmp_path, kind):
    """16 bits span 0..65535 whatever the picture shows; its own range is not stretched."""
    Image.fromarray((RAMP % 200).astype(np.uint16)).save(tmp_path / f"dark.{kind}")
    assert pixels(tmp_path / f"dark.{kind}", 1).max() <= 1


def test_16_bit_colour_keeps_its_range(tmp_path):
    ramp = np.stack([RAMP, RAMP[::-1], RAMP.T], 2)
    write_png16(tmp_path / "ramp.png", ramp)
    assert np.abs(pixels(tmp_path / "ramp.png") - ramp / 257).max() <= 1


def test_float_and_32_bit_take_their_own_range(tmp_path):
    values = np.linspace(-2, 3, 35, dtype=np.float32).reshape(7, 5)
    expected = np.round((values + 2) / 5 * 255)
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert np.abs(pixels(tmp_path / "float.tif", 1) - expected).max() <= 1
    Image.fromarray((values * 1e6).astype(np.int32)).save(tmp_path / "int.tif")
    assert np.abs(pixels(tmp_path / "int.tif", 1) - expected).max() <= 1
    Image.fromarray(np.full((3, 3), 0.25, np.float32)).save(tmp_path / "flat.tif")
    assert len(np.unique(pixels(tmp_path / "flat.tif"))) == 1


@pytest.mark.parametrize("kind", ["png", "tif", "bmp", "ppm", "webp", "jpg", "gif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_8_bit_kinds(tmp_path, kind, mode):
    """What Pillow reads from the file itself, as RGB and as grey."""
    path = tmp_path / f"x.{kind}"
    image = Image.fromarray(COLOURS).convert(mode)
    if (kind, mode) in (("jpg", "P"), ("ppm", "P")):
        image = image.convert("RGB")
    image.save(path, **({"lossless": True} if kind == "webp" else {}))
    for channels, name in ((3, "RGB"), (1, "L")):
        read = open_image(path, channels)
        assert read.mode == name and read.size == (5, 7)
        assert (np.array(read) == np.array(Image.open(path).convert(name))).all()
    if kind not in ("jpg", "gif"):
        assert (pixels(path) == np.array(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces(tmp_path, mode):
    source = Image.new(mode, (4, 3), {"CMYK": (255, 0, 0, 0)}.get(mode, (90, 140, 120)))
    source.save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as file:
        assert file.mode == mode
        assert (pixels(tmp_path / "x.tif") == np.array(file.convert("RGB"))).all()


def test_alpha_is_composited_on_white(tmp_path):
    alpha = np.full((1, 3, 4), (200, 100, 0, 0), np.uint8)
    alpha[0, :, 3] = 0, 128, 255
    expected = [[255, 255, 255], [227, 177, 127], [200, 100, 0]]
    for name in ("a.png", "a.tif"):
        Image.fromarray(alpha).save(tmp_path / name)
        assert np.abs(pixels(tmp_path / name)[0] - np.array(expected)).max() <= 1
    Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png", 1).tolist() == [[255, 0]]


def test_transparent_palette_and_colour_key(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    key = Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8))
    key.save(tmp_path / "key.png", transparency=(10, 20, 30))
    for name in ("p.png", "p.gif", "key.png"):
        assert pixels(tmp_path / name)[0].tolist() == [[255, 255, 255], [40, 50, 60]], name


TURNS = {  # how a viewer turns the stored picture
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}
STORED = {
    "colour": COLOURS,
    "grey": COLOURS[..., 0],
    "alpha": np.concatenate([COLOURS, np.full_like(COLOURS[..., :1], 255)], 2),
    "16-bit": COLOURS[..., 0] * np.uint16(257),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("stored", STORED)
def test_exif_orientation(tmp_path, orientation, kind, stored):
    """Pillow scrambles some uncompressed TIFF files that it maps into memory by name."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(STORED[stored]).save(tmp_path / f"x.{kind}", exif=exif)
    upright = TURNS[orientation](COLOURS)
    channels = 3 if stored in ("colour", "alpha") else 1
    assert np.array_equal(
        pixels(tmp_path / f"x.{kind}", channels), upright if channels == 3 else upright[..., 0]
    )


def test_jpeg_orientation_of_a_phone(tmp_path):
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, :16] = 255  # left half white; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "x.jpg", exif=exif, quality=95)
    read = pixels(tmp_path / "x.jpg", 1)
    assert read.shape == (32, 16) and read[:14].min() > 240 and read[18:].max() < 15


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact(channels):
    values = np.arange(256, dtype=np.uint8).reshape(32, 8)
    image = Image.fromarray(values)
    if channels == 3:
        image = Image.merge("RGB", [image, image.rotate(180), image.point(lambda v: 255 - v)])
    tensor = to_tensor(image)
    assert tensor.shape == (channels, 32, 8) and tensor.dtype == torch.float32
    assert tensor[0, 0, 0] == -1 and tensor[0, -1, -1] == 1
    back = to_image(tensor)
    assert back.mode == image.mode and (np.array(back) == np.array(image)).all()
    for dtype in (torch.float64, torch.float16):  # half a grey level is coarser than fp16
        assert (np.array(to_image(tensor.to(dtype))) == np.array(image)).all()


def test_to_image_clamps_and_does_not_alter_its_input():
    x = torch.tensor([[[-3.0, -1.0, 0.0, 1.0, 3.0]]], requires_grad=True)
    assert np.array(to_image(x)).tolist() == [[0, 0, 128, 255, 255]]
    assert x.tolist() == [[[-3.0, -1.0, 0.0, 1.0, 3.0]]]


DAMAGE = {
    "empty": lambda b: b"",
    "no image": lambda b: b"hello, this is text\n" * 9,
    "half": lambda b: b[: len(b) // 2],
    "header": lambda b: b[:20],
    "trailing": lambda b: b[:-40],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "bmp", "webp", "gif", "ppm"])
def test_damaged_files_are_refused_by_name(tmp_path, kind, damage):
    whole = tmp_path / f"whole.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(DAMAGE[damage](whole.read_bytes()))
    with pytest.raises(RequestError, match=f"broken.{kind}") as refusal:
        open_image(path, 3)
    assert "\n" not in str(refusal.value)


def test_damaged_headers_are_refused_by_name(tmp_path):
    """Where Pillow answers with other errors than its own."""
    (tmp_path / "token.ppm").write_bytes(b"P6\n4x 4\n255\n" + bytes(48))
    (tmp_path / "short.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 4) + b"IHDR1234")
    for name in ("token.ppm", "short.png"):
        with pytest.raises(RequestError, match=name):
            open_image(tmp_path / name, 3)


def test_implausibly_large_image_is_refused_by_name(tmp_path):
    path = tmp_path / "huge.bmp"
    Image.new("RGB", (2, 2)).save(path)
    data = bytearray(path.read_bytes())
    data[18:26] = struct.pack("<ii", 60_000, 60_000)
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"huge\.bmp"):
        open_image(path, 3)


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpeg", "sub/c.TIFF", "notes.txt", "folder.png/d.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)]
    assert names == ["a.jpeg", "b.PNG", "folder.png/d.gif", "sub/c.TIFF"]
    with pytest.raises(RequestError, match="no folder .*gone"):
        list_images(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no images in .*empty"):
        list_images(tmp_path / "empty")
