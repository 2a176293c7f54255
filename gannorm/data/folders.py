"""The user's own photographs: two unpaired folders, or one per class, or one without classes."""

import os
from contextlib import suppress
from pathlib import Path
from socket import gethostname

from gannorm.data.digest import digest
from gannorm.data.files import Files, Pixels, scaled, scaled_size, too_small
from gannorm.data.images import list_images
from gannorm.data.preflight import Checked, check, in_parallel, usable
from gannorm.data.source import Data, Source
from gannorm.errors import RequestError
from gannorm.schema import FolderConfig, ImageFolderConfig


def _check_request(cfg: FolderConfig) -> Path:
    smaller = [side for side, (load, size) in
               {"height": (cfg.load[0], cfg.size[0]), "width": (cfg.load[1], cfg.size[1])}.items()
               if load < size]  # fmt: skip
    if cfg.preprocess not in ("crop", "none") and smaller:
        raise RequestError(
            f"data.load_size={cfg.load_size} is smaller than data.image_size={cfg.image_size}: "
            f"images are resized to load_size, then cropped to image_size "
            f"(data.preprocess={cfg.preprocess})"
        )
    if cfg.preprocess == "none" and cfg.batch_size > 1:
        raise RequestError(
            f"data.preprocess=none keeps every image's own size, and data.batch_size="
            f"{cfg.batch_size} images of different sizes are no batch; set data.batch_size=1"
        )
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise RequestError(
            f"data.root={cfg.root} is not a folder; give the folder of your images with data.root="
        )
    return root


def folder_pair(cfg: FolderConfig) -> Data:
    """Unpaired translation from `root/trainA`, `root/trainB` and, if there, `testA`, `testB`."""
    root = _check_request(cfg)
    missing = [name for name in ("trainA", "trainB") if not (root / name).is_dir()]
    if missing:
        raise RequestError(
            f"data=folder_pair: {root} has no folder {' and no folder '.join(missing)}; it needs "
            "trainA and trainB, and testA and testB for held-out images"
        )
    names = ["trainA", "trainB", *(n for n in ("testA", "testB") if (root / n).is_dir())]
    sets, skipped = _checked({name: list_images(root / name) for name in names}, cfg)
    domains: list[Source] = []
    plain: list[Source] = []
    test: list[Source] = []
    for end, channels in zip("AB", cfg.channel_pair, strict=True):
        files = sets[f"train{end}"]
        pixels = _pixels(files, cfg, channels)
        domains.append(Files(files, None, cfg, channels, True, pixels))
        plain.append(Files(files, None, cfg, channels, False, pixels))
        held = sets.get(f"test{end}")
        test.append(plain[-1] if held is None else Files(held, None, cfg, channels, False))
    return Data(domains, test, plain, skipped=skipped)


def image_folder(cfg: ImageFolderConfig) -> Data:
    """`root/<class>/...`, classes numbered in the order of their names; or, without labels, all
    images below `root`."""
    root = _check_request(cfg)
    if cfg.labels:
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        if not classes:
            raise RequestError(
                f"data=image_folder: {root} has no folders in it; it needs one folder of images "
                "per class (a single class is one folder), or data.labels=false"
            )
        found = {name: list_images(root / name) for name in classes}
    else:
        found = {"all": list_images(root)}
    sets, skipped = _checked(found, cfg)
    files = [file for each in sets.values() for file in each]
    labels = [number for number, each in enumerate(sets.values()) for _ in each]
    named = labels if cfg.labels else None
    channels = cfg.channel_pair[0]
    pixels = _pixels(files, cfg, channels)
    plain = Files(files, named, cfg, channels, False, pixels)
    train = Files(files, named, cfg, channels, True, pixels)
    names = list(sets) if cfg.labels else None
    return Data(
        [train], [plain], [plain], len(names) if names else None, class_names=names, skipped=skipped
    )


def _checked(
    sets: dict[str, list[Path]], cfg: FolderConfig
) -> tuple[dict[str, list[Checked]], list[str]]:
    """By name what can be used of each set, and a line for each file that cannot.

    Raises:
        RequestError: files that cannot be used (data.on_bad=fail), or a set without any other.
    """
    paths = [path for each in sets.values() for path in each]
    found = check(paths, Path(cfg.cache).expanduser(), cfg.root)
    good, skipped = usable(found, lambda file: too_small(file.size, cfg), cfg.on_bad == "skip")
    kept = {name: [found[p] for p in each if p in good] for name, each in sets.items()}
    for name, files in kept.items():
        if not files:
            raise RequestError(
                f"data.on_bad=skip: none of the {len(sets[name])} images of {name} can be used"
            )
    return kept, skipped


def _pixels(files: list[Checked], cfg: FolderConfig, channels: int) -> Pixels | None:
    """The scaled pixels in a file, made if need be; None where they are too many to be kept."""
    if cfg.preprocess == "none":
        return None
    sizes = [scaled_size(file.size, cfg) for file in files]
    shapes = [(height, width, channels) for height, width in sizes]
    content = digest(*(f.content for f in files), shapes)
    folder = Path(cfg.cache).expanduser()
    kept = Pixels(folder / f"pixels-{content}.bin", shapes)
    if kept.total > cfg.cache_gb * 1e9:
        return None
    with suppress(OSError):  # a folder that cannot be written to, a full disk: decoded each time
        if kept.path.is_file() and kept.path.stat().st_size == kept.total:
            os.utime(kept.path)
        else:
            _make_room(folder, cfg.cache_gb * 1e9 - kept.total)
            _write(kept, files, sizes, channels)
        return kept
    return None


def _write(kept: Pixels, files: list[Checked], sizes: list[tuple[int, int]], channels: int) -> None:
    kept.path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = kept.path.with_suffix(f".{gethostname()}.{os.getpid()}.partial")

    def pixels(i: int) -> bytes:
        return scaled(files[i].path, channels, sizes[i]).tobytes()

    try:
        with partial_path.open("wb") as out:
            for each in in_parallel(pixels, list(range(len(files))), "resizing images"):
                out.write(each)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial_path, kept.path)
    finally:
        partial_path.unlink(missing_ok=True)


def _make_room(folder: Path, most: float) -> None:
    """Delete the pixels that were not used for longest, until `most` bytes are left of them."""
    kept = sorted(folder.glob("pixels-*.bin"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for path in kept:
        total += path.stat().st_size
        if total > most:
            path.unlink()
