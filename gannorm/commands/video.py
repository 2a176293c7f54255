"""Videos, frame by frame; PyAV reads and writes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gannorm.errors import RequestError

EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
BT709 = 1  # as video files number the matrix, primaries and transfer of high definition


def check_installed(path: Path) -> None:
    if find_spec("av") is None:
        raise RequestError(f"{path}: PyAV is not installed, which reads videos; pip install av")


def translate_video(
    source: Path,
    target: Path,
    translate: Callable[[list[Image.Image]], list[Image.Image]],
    batch: int,
) -> None:
    """Write the frames of `source`, translated `batch` at a time, into the MP4 file `target`.

    H.264 at the source's mean frame rate, without its sound. An odd width or height, which H.264
    does not have, grows by one: the last column or row is repeated.

    Raises:
        RequestError: a file that is no video, is damaged, or has no frame.
    """
    import av

    partial = target.with_suffix(".partial")
    try:
        with _reading(source):
            opened = av.open(str(source))
        with opened as video:
            if not video.streams.video:
                raise RequestError(f"cannot read the video {source}: it has no picture")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate or 25
            frames = _upright(source, video, stream.frames or None)
            first = list(islice(frames, batch))
            if not first:
                raise RequestError(f"cannot read the video {source}: it has no frame")
            with av.open(str(partial), "w", format="mp4") as file:
                _encode(file, rate, _batches(first, frames, translate, batch))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise RequestError(f"cannot read the video {source}: {error.strerror}") from error


def _upright(source: Path, video: Any, count: int | None) -> Iterator[Image.Image]:
    """The frames as a player shows them, all of the size of the first."""
    size = None
    with _reading(source):
        decoded = video.decode(video=0)
        for frame in tqdm(decoded, total=count, unit="frame", desc=source.name, leave=False):
            # PyAV below 17 takes colours for BT.601's unless it is given two that differ.
            said = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"}
            image = frame.to_image(**(said if frame.colorspace == BT709 else {}))
            if frame.rotation:  # a telephone held upright
                image = image.rotate(frame.rotation, expand=True)
            size = size or image.size
            yield image if image.size == size else image.resize(size)


def _batches(
    first: list[Image.Image],
    frames: Iterator[Image.Image],
    translate: Callable[[list[Image.Image]], list[Image.Image]],
    batch: int,
) -> Iterator[Image.Image]:
    while first:
        yield from translate(first)
        first = list(islice(frames, batch))


def _encode(file: Any, rate: Any, images: Iterator[Image.Image]) -> None:
    import av

    stream = None
    for image in images:
        levels = np.asarray(image.convert("RGB"))
        height, width = levels.shape[:2]
        levels = np.pad(levels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        if stream is None:
            stream = file.add_stream("libx264", rate=rate)
            stream.height, stream.width = levels.shape[:2]
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(levels), format="rgb24")
        file.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
    if stream is not None:
        file.mux(stream.encode())
