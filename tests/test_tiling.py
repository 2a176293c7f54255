"""Pictures in tiles: what the whole picture makes, in memory that does not grow with it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from generators import generator
from test_translation import CPU, names, scene
from torch import nn
from torch.nn.functional import pad

from gannorm.commands import tiling
from gannorm.commands.tiling import Moments, Tiler
from gannorm.errors import RequestError

ROOT = Path(__file__).parents[1]


def levels(height, width, channels=3) -> torch.Tensor:
    image = torch.from_numpy(np.array(scene(height, width))).permute(2, 0, 1)
    return image[:channels].contiguous()


def both(net, image, tile, folder, multiple=4):
    """A picture's translation whole and in tiles, the latter's strips."""
    _, height, width = image.shape
    size = tuple(side + -side % multiple for side in (height, width))
    with torch.no_grad():
        x = image[None].float() / 127.5 - 1
        x = pad(x, (0, size[1] - width, 0, size[0] - height), mode="replicate")
        whole = net(x)[0, :, :height, :width]
        strips = list(Tiler(tile, folder, CPU).strips(net, image, size))
    rows = [strip.shape[1] for _, strip in strips]
    assert [top for top, _ in strips] == [sum(rows[:i]) for i in range(len(rows))]
    return whole, torch.cat([strip for _, strip in strips], 1), rows


@pytest.mark.parametrize(
    "overrides",
    [
        ("norm=instance",),
        ("norm=batch",),
        ("norm=group", "norm.num_groups=4"),
        ("norm=layer",),
        ("norm=instance", "norm.affine=false", "model.dropout=true"),
        ("norm=none",),
    ],
    ids=lambda overrides: "-".join(overrides).replace("norm=", ""),
)
def test_tiles_make_what_the_whole_picture_makes(overrides, tmp_path):
    net = generator(*overrides)
    whole, tiled, rows = both(net, levels(300, 420), 64, tmp_path)
    assert len(rows) > 20 and whole.std() > 0.1
    assert tiled.shape == whole.shape and (tiled - whole).abs().max() < 1e-4
    assert names(tmp_path) == []


@pytest.mark.parametrize("tile", [1, 9, 31, 4096])
@pytest.mark.parametrize("downsamplings", [0, 1, 2, 3])
def test_odd_sizes_any_tile_any_depth_grey_to_colour(downsamplings, tile, tmp_path):
    net = generator(f"model.downsamplings={downsamplings}", channels=(1, 3))
    whole, tiled, rows = both(net, levels(37, 61, 1), tile, tmp_path, 2**downsamplings)
    assert tiled.shape == (3, 37, 61) and (tiled - whole).abs().max() < 1e-4
    assert len(rows) == {1: 37, 4096: 1}.get(tile, len(rows))


def test_a_tile_s_own_statistics_would_show(tmp_path, monkeypatch):
    """The picture above is one where it matters whose the statistics are."""
    net, image = generator("norm=instance"), levels(300, 420)
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, x: None if self.count else add(self, x))
    whole, tiled, _ = both(net, image, 64, tmp_path)
    assert (tiled - whole).abs().max() > 0.1


def test_moments_of_strips_are_those_of_the_map():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 40, 7) * 0.01 + torch.arange(6).view(1, 6, 1, 1) * 100
    moments = Moments()
    for strip in x.split([1, 20, 3, 16], 2):
        moments.add(strip)
    for groups in (6, 3, 1):
        sets = x.double().view(groups, -1)
        mean, var = (t.view(6) for t in moments.of_groups(groups))
        repeat = 6 // groups
        assert torch.allclose(mean.double(), sets.mean(1).repeat_interleave(repeat), rtol=1e-6)
        expected = sets.var(1, correction=0).repeat_interleave(repeat)
        assert torch.allclose(var.double(), expected, rtol=1e-5)


def test_half_precision_in_tiles(tmp_path):
    net = generator("norm=instance")
    with torch.autocast("cpu", torch.bfloat16):
        whole, tiled, _ = both(net, levels(100, 84), 32, tmp_path)
    assert whole.dtype == tiled.dtype == torch.bfloat16
    assert (tiled.float() - whole.float()).abs().mean() < 0.02


def test_a_layer_that_cannot_be_tiled_is_refused(tmp_path):
    net = generator("norm=instance")
    net.model[2] = nn.InstanceNorm2d(8)
    with pytest.raises(RequestError, match="InstanceNorm2d.* --tile 0"):
        both(net, levels(40, 40), 16, tmp_path)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(tiling.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "r+b", 0))
    with pytest.raises(RequestError, match="disk of the output folder is full.*--tile 0"):
        both(generator("norm=instance"), levels(40, 40), 16, tmp_path)


MEMORY = """
import sys
sys.path.insert(0, "tests")
from test_tiling import CPU, Path, Tiler, generator, torch
net, folder = generator("model.downsamplings=2"), Path(sys.argv[1])
for n in (320, 1024):
    image = torch.randint(0, 256, (3, n, n), dtype=torch.uint8)
    with torch.no_grad():
        for _ in Tiler(160, folder, CPU).strips(net, image, (n, n)):
            pass
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_picture(tmp_path):
    """A map of 8 channels of the whole picture has 34 MB, of a tile 0.8 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    small, large = (int(kilobytes) / 1024 for kilobytes in done.stdout.split())
    print(small, large)
    assert large - small < 16, f"peak memory {small:.0f} and {large:.0f} MB"
