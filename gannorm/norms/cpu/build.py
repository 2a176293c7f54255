"""Libraries of C kernels: compiled by the machine's own C compiler at first use, and kept.

Compiling takes about two seconds, once for each machine. What is kept ends with its own digest, so
that a damaged library is made anew, and is loaded from the very file that was looked at: one that
somebody else could have written would run whatever they like.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
# What the source's Norm is given: integers, reals, tensors (address, elements from sample to
# sample), addresses. The compiler checks that the source counts alike. One call to pack it costs
# less than a structure of ctypes.
FIELDS = {"INTEGERS": 10, "REALS": 4, "TENSORS": 6, "ADDRESSES": 11}
_integers, _reals, _tensors, _addresses = FIELDS.values()
pack = struct.Struct(f"={_integers}q{_reals}d{2 * _tensors}q{_addresses}q").pack
DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Source:
    """What a library is compiled of.

    Attributes:
        files: the one that is compiled, and those that it includes.
        flags: beside FLAGS.
        counts: numbers that it is given as macros.
        what: what runs slower without it, in words.
    """

    files: tuple[Path, ...]
    flags: tuple[str, ...]
    counts: dict[str, int]
    what: str


_HERE = Path(__file__).parent
NORM = Source(
    (_HERE / "norm.c", _HERE / "norm_real.c"),
    ("-ffp-contract=off",),  # results must not depend on what a compiler fuses: the source says it
    FIELDS,
    "norms",
)


def kernels() -> ctypes.CDLL | None:
    """The norms' compiled kernels; None where they cannot be had."""
    return compiled(NORM)


@functools.cache
def compiled(source: Source) -> ctypes.CDLL | None:
    """The library that `source` makes; None where it cannot be had."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or not compiler or shutil.which(compiler[0]) is None:
        return None
    try:
        path = compiled_path(compiler, source)
        loaded = load(path)
        if loaded is None:
            compile_to(path, compiler, source)
            loaded = load(path)
        return loaded
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        if isinstance(error, subprocess.CalledProcessError):
            name = source.files[0].name
            reason = f"{shlex.join(compiler)} could not compile {name}: {reason}"
        warnings.warn(
            f"{source.what} on the CPU run on torch ops, slower: {reason.strip()[:300]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def compiled_path(compiler: list[str], source: Source = NORM) -> Path:
    """Where the library of this source, compiler and processor is kept."""
    folder = Path(os.environ.get("GANNORM_CACHE", "~/.cache/gannorm")).expanduser() / "cpu"
    processor = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line.lower()
         or line.startswith("Features")),
        platform.machine(),
    )  # fmt: skip
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    flags = *FLAGS, *source.flags, *map(str, source.counts.items())
    known = "\n".join((*compiler, version.stdout, *flags, processor, platform.platform()))
    text = b"".join(file.read_bytes() for file in source.files)
    digest = hashlib.sha256(text + known.encode()).hexdigest()[:16]
    return folder / f"{source.files[0].stem}-{digest}.so"


def load(path: Path) -> ctypes.CDLL | None:
    """The library `path`; None where there is none, or a damaged one.

    Raises:
        OSError: it is not to be trusted, or does not load.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    loaded = None
    try:
        folder = os.lstat(path.parent)  # a link counts as what all can write to
        for each, status in ((path.parent, folder), (path, os.fstat(file))):
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                raise PermissionError(
                    f"others can write to {each} (owner {status.st_uid}, mode "
                    f"{status.st_mode & 0o777:o}), so it is not loaded; delete it, or name a "
                    "folder of your own with GANNORM_CACHE"
                )
        with open(file, "rb", closefd=False) as stream:
            content = stream.read()
        if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
            return None
        loaded = ctypes.CDLL(f"/proc/self/fd/{file}")
        return loaded
    finally:
        if loaded is None:  # else its number stays taken: dlopen knows a library by its path
            os.close(file)


def compile_to(path: Path, compiler: list[str], source: Source = NORM) -> None:
    """Compile the source; `path` is never there by half."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        flags = *FLAGS, *source.flags, *(f"-D{name}={n}" for name, n in source.counts.items())
        command = [*compiler, *flags, "-shared", "-fPIC", str(source.files[0]), "-o", str(made)]
        subprocess.run([*command, "-lm"], check=True, capture_output=True, text=True)
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.chmod(0o700)
        made.replace(path)


def keep_memory() -> None:
    """Let this process keep the memory it frees, instead of the system.

    The C library returns tensors of more than 32 MB at once; the pages of the next one then cost
    more than a norm on it. Where there is no such setting (it is glibc's), nothing happens.
    """
    if sys.platform != "linux":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        set_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free at the top
