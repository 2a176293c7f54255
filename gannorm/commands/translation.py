"""`python -m gannorm translate`: images and videos, translated."""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from gannorm.commands import video
from gannorm.commands.pictures import (
    beside,
    find_sources,
    is_video,
    parse_size,
    resized,
)
from gannorm.commands.tiling import Tiler
from gannorm.commands.trained import load_task, make_folder, pick_generator, write_image
from gannorm.data.images import open_image, rounded, to_levels, to_picture
from gannorm.errors import RequestError
from gannorm.models import ResnetGenerator
from gannorm.tasks import CycleGAN
from gannorm.tasks.task import PRECISIONS

WHOLE = 1024 * 1024  # pixels of the largest picture that runs in one piece unless told
TILE = 512
GENERATORS = {"AtoB": "G_A", "BtoA": "G_B"}
NAMED = 20  # files that the closing error names

EPILOG = f"""\
Which size: a generator has seen pictures of one scale, that of its training (data.image_size), and
translates others less well. native is right where the picture's objects are as large in pixels as
in the training pictures, so for pictures of that size and for larger views of the same scale (maps,
aerial and microscope images). train is right for pictures that show the same thing larger, such as
photographs from a camera: their shorter side becomes the training size, and the result is written
at that size. Distort the picture with HxW only if training did.

Large pictures: one above {WHOLE} pixels runs layer by layer in tiles. The norms' statistics are
those of the whole picture, so the result is the same without tiles, to rounding. The network's
memory does not grow with the picture, which is held as 8-bit levels; its feature maps are kept in
OUT_DIR meanwhile, where they take up to 3 bytes for each pixel and unit of model.width (13 GB at
8192x8192 and width 64; half in bf16 or fp16).

example:
  python -m gannorm translate outputs/RUN photos/ translated/ --direction AtoB --size train
"""


def add(commands: Any) -> None:
    two = commands.add_parser(
        "translate",
        help="translate images and videos",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    two.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    two.add_argument("source", type=Path, metavar="IN", help="a folder, an image or a video")
    two.add_argument("target", type=Path, metavar="OUT_DIR")
    two.add_argument("--direction", choices=("AtoB", "BtoA"), required=True)
    two.add_argument(
        "--size", default="native", metavar="S",
        help="native: as it is (default); train: the shorter side as in training; N: the shorter "
        "side N; HxW: exactly",
    )  # fmt: skip
    two.add_argument(
        "--tile", type=int, metavar="N",
        help=f"tiles of at most N x N pixels; 0: never; by default {TILE} for pictures above "
        f"{WHOLE} pixels",
    )  # fmt: skip
    two.add_argument(
        "--batch", type=int, default=1, metavar="N", help="pictures of a size at a time (1)"
    )
    two.add_argument(
        "--compare", action="store_true", help="write the source to the left of the translation"
    )
    two.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    two.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    two.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    translate(
        a.checkpoint, a.source, a.target, a.direction, size=a.size, tile=a.tile, batch=a.batch,
        compare=a.compare, device=a.device, precision=a.precision,
    )  # fmt: skip


@torch.no_grad()
def translate(
    path: Path,
    source: Path,
    target: Path,
    direction: str,
    *,
    size: str = "native",
    tile: int | None = None,
    batch: int = 1,
    compare: bool = False,
    device: str = "auto",
    precision: str = "fp32",
) -> None:
    """Translate an image or video, or every one below a folder, into the folder `target`.

    Images of any size, in any of the formats in `gannorm.data.images`, become PNGs of the same
    name, videos MP4s. The averaged generator is used.

    Args:
        path: checkpoint file or run folder.
        direction: AtoB or BtoA.
        size: native, train, N or HxW: what a picture is resized to before.
        tile: side of the tiles that large pictures run in; 0: never; None: 512 above WHOLE pixels.
        batch: pictures of one size that run at a time.
        compare: write the source to the left of the translation.
        device: auto, cpu or cuda.
        precision: fp32, bf16 or fp16 of the convolutions; fp16 needs a GPU.

    Raises:
        RequestError: nothing to translate, two that would get the same name, an option that cannot
            be, or unreadable files (after all others were translated).
    """
    _check(tile, batch, device, precision)
    parse_size(size, (1, 1))
    sources = find_sources(source, target)
    for p in filter(is_video, sources.values()):
        video.check_installed(p)
    task = load_task(path, "cyclegan", device)
    assert isinstance(task, CycleGAN)
    pick_generator(task, GENERATORS[direction], path)
    make_folder(target)
    translator = Translator(task, direction, size, tile, compare, precision, target)
    job = _Job(translator, batch, len(sources))
    with task.norm_backend():
        for written, p in sources.items():
            job.take(p, written)
        job.finish()
    job.report(target)


def _check(tile: int | None, batch: int, device: str, precision: str) -> None:
    if tile is not None and tile < 0:
        raise RequestError(f"--tile {tile} must be the side of a tile in pixels, or 0: never")
    if batch < 1:
        raise RequestError(f"--batch {batch} must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: no GPU was found; use --device auto or --device cpu")
    if precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise RequestError("--precision fp16 needs a GPU; on the CPU use fp32 or bf16")


class Translator:
    """One direction of a CycleGAN, on 8-bit pictures (C, H, W).

    Args:
        size, tile, compare, precision: as in `translate`.
        folder: where tiles keep their feature maps.
    """

    def __init__(
        self, task: CycleGAN, direction: str, size: str, tile: int | None, compare: bool,
        precision: str, folder: Path,
    ) -> None:  # fmt: skip
        side = list(GENERATORS).index(direction)
        net = task.averaged[GENERATORS[direction]]
        assert isinstance(net, ResnetGenerator)
        self.net, self.device = net, task.device
        self.channels = task.cfg.data.channel_pair[side]
        self.multiple = 2**task.model.downsamplings
        self.size = parse_size(size, task.cfg.data.size)
        self.tile, self.compare, self.folder = tile, compare, folder
        self.dtype = PRECISIONS[precision]

    def read(self, path: Path) -> Tensor:
        """The levels of an image file at the size it is translated at."""
        return self.prepared(open_image(path, self.channels))

    def prepared(self, image: Image.Image) -> Tensor:
        mode = "L" if self.channels == 1 else "RGB"  # of a video's frames
        return to_levels(resized(image, self.size).convert(mode))

    def frames(self, images: list[Image.Image]) -> list[Image.Image]:
        levels = [self.prepared(image) for image in images]
        return [to_picture(each) for each in self(levels)]

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
        """The translations of pictures of one size, as they are written."""
        _, height, width = images[0].shape
        size = padded_size(height, width, self.multiple)
        tile = self.tile
        if tile is None:
            tile = TILE if size[0] * size[1] > WHOLE else 0
        half = self.dtype is not torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            if tile:
                made = [self._tiled(image, size, tile) for image in images]
            else:
                made = self._whole(images)
        if self.compare:
            made = [beside(*pair) for pair in zip(images, made, strict=True)]
        return made

    def _whole(self, images: list[Tensor]) -> list[Tensor]:
        _, height, width = images[0].shape
        x = torch.stack(images).to(self.device).float().div_(127.5).sub_(1)
        try:
            return list(rounded(any_size(self.net, x, self.multiple)))
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"{len(images)} of {height}x{width} pixels at a time do not fit into the GPU's "
                f"memory; use --tile {TILE}, or a smaller --batch"
            ) from error

    def _tiled(self, image: Tensor, size: tuple[int, ...], tile: int) -> Tensor:
        made = None
        layers = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in self.net.modules())
        with tqdm(total=layers, unit="layer", leave=False) as bar:
            tiler = Tiler(tile, self.folder, self.device, bar.update)
            for top, strip in tiler.strips(self.net, image, (size[0], size[1])):
                if made is None:
                    made = torch.empty((*image.shape[1:], len(strip)), dtype=torch.uint8)
                    made = made.permute(2, 0, 1)  # lies in memory as it is written
                made[:, top : top + strip.shape[1]] = rounded(strip)
        assert made is not None
        return made


def any_size(net: nn.Module, x: Tensor, multiple: int) -> Tensor:
    """Images (N, C, H, W) of any size through a generator, their borders repeated where needed."""
    height, width = x.shape[-2:]
    size = padded_size(height, width, multiple)
    padded = pad(x, (0, size[1] - width, 0, size[0] - height), mode="replicate")
    return net(padded)[:, :, :height, :width]


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    smallest = 4 * multiple  # below it the reflection padding has nothing to reflect
    return (
        max(height + -height % multiple, smallest), max(width + -width % multiple, smallest)
    )  # fmt: skip


class _Job:
    """Files through a translator, pictures of one size `batch` at a time."""

    def __init__(self, translator: Translator, batch: int, count: int) -> None:
        self.translator, self.batch, self.count = translator, batch, count
        self.waiting: dict[torch.Size, list[tuple[Path, Tensor]]] = {}
        self.done = {"images": 0, "videos": 0}
        self.failed: list[str] = []
        self.bar = tqdm(total=count, unit="file")

    def take(self, source: Path, written: Path) -> None:
        """Translate a file into `written`, or keep it until there are enough of its size."""
        try:
            if is_video(source):
                written.parent.mkdir(parents=True, exist_ok=True)
                video.translate_video(source, written, self.translator.frames, self.batch)
                self._count("videos", 1)
                return
            levels = self.translator.read(source)
        except RequestError as error:
            self._fail([str(error)])
            return
        self.waiting.setdefault(levels.shape, []).append((written, levels))
        # Of many sizes few are kept: the largest group then runs before it is full.
        largest = max(self.waiting.values(), key=len)
        if len(largest) == self.batch or sum(map(len, self.waiting.values())) >= 4 * self.batch:
            self._translate(self.waiting.pop(largest[0][1].shape))

    def finish(self) -> None:
        for group in self.waiting.values():
            self._translate(group)
        self.bar.close()

    def _translate(self, group: list[tuple[Path, Tensor]]) -> None:
        try:
            made = self.translator([levels for _, levels in group])
        except RequestError as error:
            self._fail([f"{written}: {error}" for written, _ in group])
            return
        for (written, _), levels in zip(group, made, strict=True):
            written.parent.mkdir(parents=True, exist_ok=True)
            write_image(to_picture(levels), written)
        self._count("images", len(group))

    def _count(self, kind: str, count: int) -> None:
        self.done[kind] += count
        self.bar.update(count)

    def _fail(self, reasons: list[str]) -> None:
        self.failed += reasons
        self.bar.update(len(reasons))

    def report(self, target: Path) -> None:
        """Say what was done.

        Raises:
            RequestError: files that were not translated.
        """
        kinds = [f"{n} {kind}" for kind, n in self.done.items() if n or kind == "images"]
        print(f"{' and '.join(kinds)} in {target}")
        if self.failed:
            more = len(self.failed) - NAMED
            said = self.failed[:NAMED] + ([f"and {more} more"] if more > 0 else [])
            raise RequestError(
                f"{len(self.failed)} of {self.count} not translated: {'; '.join(said)}"
            )
