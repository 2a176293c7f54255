"""The same content, the same word; any other content, another."""

import os

import torch
from digit_data import digit_data
from PIL import Image

from gannorm.data import Data, build_data
from gannorm.data.digest import digest
from gannorm.schema import ImageFolderConfig


def test_digest(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    words = [
        digest(), digest(x), digest(x.int()), digest(x.reshape(3, 2)), digest(x + 1), digest(x, x),
        digest("x"), digest("x", "y"), digest("xy"), digest(1), digest("1"), digest(file),
        digest(str(file)), digest(None), digest(x.bool()),
    ]  # fmt: skip
    assert len(set(words)) == len(words)
    assert all(len(w) == 32 and set(w) <= set("0123456789abcdef") for w in words)
    assert digest(x.T.contiguous().T, 1) == digest(x, 1)  # values, not their layout
    before = digest(file)
    other = tmp_path / "b"
    other.write_bytes(b"abc")
    assert digest(other) == before
    file.write_bytes(b"abd")
    assert digest(file) != before


def words(data: Data) -> list[str]:
    return [s.digest() for sources in (data.domains, data.real, data.test) for s in sources]


def test_embedded_data():
    for name in ("digits", "digits_m"):
        first = words(digit_data(name, 32, 3))
        assert first == words(digit_data(name, 32, 3, 7, 2))  # the same images
        assert not set(first) & set(words(digit_data(name, 16, 3)))
        assert not set(first) & set(words(digit_data(name, 32, 1)))
        data = digit_data(name, 32, 3)
        assert data.real[0] is data.domains[0] and data.test[0] is not data.real[0]


def folder(root, flip=True, size=8, name="image_folder"):
    return build_data(
        ImageFolderConfig(
            cache=os.environ["GANNORM_CACHE"],
            name=name,
            image_size=size,
            channels=3,
            batch_size=2,
            num_workers=0,
            root=str(root),
            load_size=10,
            flip=flip,
        )
    )


def test_folders(tmp_path):
    for name, shade in (("cats", 10), ("dogs", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (12, 12), (shade, 0, 0)).save(tmp_path / name / "1.png")
    data = folder(tmp_path)
    augmented, real, test = words(data)
    assert real == test and augmented != real and data.real[0] is data.test[0]
    assert words(folder(tmp_path, flip=False))[1] == real != words(folder(tmp_path, size=9))[1]
    assert words(folder(tmp_path, flip=False))[0] != augmented
    (tmp_path / "cats").rename(tmp_path / "elks")  # other labels, the same files in other order
    assert words(folder(tmp_path))[1] != real
    (tmp_path / "elks").rename(tmp_path / "cats")
    assert words(folder(tmp_path)) == [augmented, real, test]
    Image.new("RGB", (12, 12), (11, 0, 0)).save(tmp_path / "cats" / "1.png")
    assert words(folder(tmp_path))[1] != real


def test_pairs_without_held_out_images(tmp_path):
    for name in ("trainA", "trainB", "testA"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (12, 12), (len(name), 0, ord(name[-1]))).save(tmp_path / name / "1.png")
    data = folder(tmp_path, name="folder_pair")
    assert data.test[0] is not data.real[0] and data.test[1] is data.real[1]
    assert len(set(words(data))) == 5
