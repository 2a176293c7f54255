"""Every file looked at once before training, in parallel; what was found is kept for the next run.

A file is known by its size and time of change; one that changed is read again.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from gannorm.data.digest import digest
from gannorm.data.images import read_image
from gannorm.errors import RequestError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 256  # results that wait for their turn at most


@dataclass(frozen=True)
class Checked:
    """A file: its content's digest, and height and width upright; or what is wrong with it."""

    path: Path
    content: str
    size: tuple[int, int]
    fault: str = ""


def check(paths: list[Path], cache: Path, root: str) -> dict[Path, Checked]:
    """Every file decoded, unless an earlier check of the same file is kept in `cache`."""
    kept = cache / f"checked-{digest(os.path.realpath(root))}.json"
    known = _read(kept)
    stamps = {path: _stamp(path) for path in paths}
    found = {
        path: Checked(path, entry[1], (entry[2], entry[3]), entry[4])
        for path in paths
        if (entry := known.get(str(path))) and entry[0] == stamps[path]
    }
    new = [path for path in paths if path not in found]
    if new:
        found |= {each.path: each for each in in_parallel(_decoded, new, "checking images")}
        entries = known | {
            str(path): [stamps[path], each.content, *each.size, each.fault]
            for path, each in found.items()
        }
        with suppress(OSError):  # then they are checked again the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(entries), encoding="utf-8", errors="surrogateescape")
            os.replace(partial, kept)
    return found


def usable(
    found: dict[Path, Checked], judge: Callable[[Checked], str], skip: bool
) -> tuple[set[Path], list[str]]:
    """The files that can be used, and a line for each other one.

    judge: why a readable file cannot be used, or "".

    Raises:
        RequestError: naming all files that cannot be used, unless they are to be skipped.
    """
    faults = {path: each.fault or judge(each) for path, each in found.items()}
    bad = [f"{path}: {why}" for path, why in faults.items() if why]
    if bad and not skip:
        listed = "\n  ".join(bad)
        raise RequestError(
            f"{len(bad)} of {len(found)} images cannot be used; mend or remove them, or set "
            f"data.on_bad=skip:\n  {listed}"
        )
    for line in bad:
        tqdm.write(f"skipped {line}", file=sys.stderr)
    return {path for path, why in faults.items() if not why}, bad


def in_parallel(
    function: Callable[[Item], Result], items: list[Item], title: str
) -> Iterable[Result]:
    """The results in order, with a bar; Pillow decodes outside of Python's lock."""
    with (
        ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
        tqdm(total=len(items), desc=title, unit="image", dynamic_ncols=True) as bar,
    ):
        for start in range(0, len(items), AHEAD):
            for result in pool.map(function, items[start : start + AHEAD]):
                yield result
                bar.update()


def _decoded(path: Path) -> Checked:
    try:
        content = path.read_bytes()
        image = read_image(io.BytesIO(content), 3)
    except Exception as error:  # a damaged file leads Pillow's readers to errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif "cannot identify image file" in reason:
            reason = "an empty file" if not content else "not an image, or damaged"
        return Checked(path, "", (0, 0), reason)
    name = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Checked(path, name, (image.height, image.width))


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:  # a link to nowhere
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
