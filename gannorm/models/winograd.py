"""3x3 convolutions on an eager CPU by Winograd's minimal filtering (`winograd.c`): 2 to 3 times as
fast as oneDNN's direct ones.

float32, channels last, stride 1, padding 1. An output's error is about 5 times that of a direct
convolution, 1e-6 of the outputs' standard deviation; cuDNN's, with the usual points, is larger.
"""

import functools
import struct
import threading
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gannorm.norms.composed import is_plain
from gannorm.norms.cpu import build, real

SPARE = 80  # floats between the points of a workspace
# What the source's Conv is given: integers, then addresses, of which four are its workspace's.
COUNTS = {"INTEGERS": 10, "ADDRESSES": 12, "SPARE": SPARE}
# Sums over channels are products of float32: a compiler may fuse them, as it always can the same.
SOURCE = build.Source(
    (Path(__file__).with_name("winograd.c"),), ("-ffp-contract=fast",), COUNTS, "3x3 convolutions"
)
_pack = struct.Struct(f"={COUNTS['INTEGERS'] + COUNTS['ADDRESSES']}q").pack
CHUNK = 49152  # tiles at once times channels: about 7 MB of workspace


class Around(NamedTuple):
    """What is done around the convolution.

    reflect: the border is a reflection, not zeros.
    upsample: x is upsampled to twice its height and width (nearest) before it.
    relu: x passes a ReLU before it.
    pool: means of 2x2 outputs are taken behind it.
    """

    reflect: bool = False
    upsample: bool = False
    relu: bool = False
    pool: bool = False


@functools.cache
def lanes() -> int:
    """Channels come in multiples of it; 0: there is no library."""
    found = build.compiled(SOURCE)
    return 0 if found is None else int(found.conv_lanes())


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, around: Around) -> bool:
    """Whether x (N, C, H, W), weight (K, C, 3, 3) and bias (K,) are convolved here."""
    given = [t for t in (x, weight, bias) if t is not None]
    if not all(is_plain(t) and t.is_cpu and t.dtype == torch.float32 for t in given):
        return False
    if x.dim() != 4 or weight.dim() != 4:
        return False
    k, c, *kernel = weight.shape
    h, w = (side << around.upsample for side in x.shape[2:])
    return (
        kernel == [3, 3]
        and x.shape[1] == c
        and (bias is None or bias.shape == (k,))
        and x.numel() > 0
        and min(h, w) > 1
        and not (around.pool and (h % 2 or w % 2))
        and x.is_contiguous(memory_format=torch.channels_last)
        and lanes() > 0
        and c % lanes() == k % lanes() == 0
    )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, around: Around, gate: Tensor | None = None
) -> Tensor:
    """The convolution of what `takes` takes, channels last.

    gate: as x; the ReLU lets x through where it is positive. None: x itself.
    """
    n, c, h, w = x.shape
    k, up, pool = weight.shape[0], around.upsample, around.pool
    h, w = h << up, w << up
    shape = n, k, h >> pool, w >> pool
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    gate = (x if gate is None else gate) if around.relu else None
    _run("conv_forward", (n, c, k, h, w), around, (x, gate, weight, bias, None), (y, None, None))
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, around: Around, wanted: tuple[bool, bool],
    gate: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and of weight, where they are wanted.

    Of x alone, x is looked at for its shape (and as the gate) only; of weight alone, so is weight.
    """
    n, c, h, w = x.shape
    k, up = weight.shape[0], around.upsample
    dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted[0] else None
    dw = torch.empty_like(weight, memory_format=torch.channels_last) if wanted[1] else None
    if any(wanted):
        gate = (x if gate is None else gate) if around.relu else None
        given = x, gate, weight, None, dy
        _run("conv_backward", (n, c, k, h << up, w << up), around, given, (None, dx, dw))
    return dx, dw


_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """`size` floats; a thread's own, and the same ones again: large blocks that come and go leave
    holes in its memory."""
    kept: Tensor | None = getattr(_kept, "workspace", None)
    if kept is None or len(kept) < size:
        _kept.workspace = None
        _kept.workspace = kept = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept[:size]


def _placed(t: Tensor | None) -> Tensor | None:
    """`t` with its values in memory, channels last."""
    if t is None:
        return None
    layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
    return real(t).contiguous(memory_format=layout)


def _run(
    name: str, sizes: tuple[int, ...], around: Around, given: Sequence[Tensor | None],
    made: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Call the library: given are x, gate, weight, bias, dy; made are y, dx, dw."""
    n, c, k, h, w = sizes
    tiles = n * -(-h // 4) * -(-w // 4)
    chunk = min(tiles, max(48, min(252, CHUNK // (c + k) // 6 * 6)))
    of_weights, of_tiles = 36 * (c * k + SPARE), [36 * (chunk * side + SPARE) for side in (c, k)]
    ends = [*accumulate((of_weights, *of_tiles, 0 if made[2] is None else of_weights), initial=0)]
    room = _workspace(ends[-1]).data_ptr()
    tensors = [*map(_placed, given), *made]  # kept until the library is done
    getattr(build.compiled(SOURCE), name)(_pack(
        n, c, k, h, w, around.reflect, around.upsample, around.pool, torch.get_num_threads(), chunk,
        *[0 if t is None else t.data_ptr() for t in tensors], *[room + 4 * end for end in ends[:4]],
    ))  # fmt: skip
