"""The library of the C kernels: compiled by the machine's own C compiler at first use, and kept.

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
from pathlib import Path

HERE = Path(__file__).parent
SOURCE, INCLUDED = HERE / "norm.c", HERE / "norm_real.c"
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
    "-ffp-contract=off",  # results must not depend on what a compiler fuses: the source says it
)
# What the source's Norm is given: integers, reals, tensors (address, elements from sample to
# sample), addresses. The compiler checks that the source counts alike. One call to pack it costs
# less than a structure of ctypes.
FIELDS = {"INTEGERS": 10, "REALS": 4, "TENSORS": 6, "ADDRESSES": 11}
_integers, _reals, _tensors, _addresses = FIELDS.values()
pack = struct.Struct(f"={_integers}q{_reals}d{2 * _tensors}q{_addresses}q").pack
DIGEST = hashlib.sha256().digest_size


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or not compiler or shutil.which(compiler[0]) is None:
        return None
    try:
        path = compiled_path(compiler)
        library = load(path)
        if library is None:
            compile_to(path, compiler)
            library = load(path)
        return library
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"{shlex.join(compiler)} could not compile {SOURCE.name}: {reason}"
        warnings.warn(
            f"norms on the CPU run on torch ops, slower: {reason.strip()[:300]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def compiled_path(compiler: list[str]) -> Path:
    """Where the library of this source, compiler and processor is kept."""
    folder = Path(os.environ.get("GANNORM_CACHE", "~/.cache/gannorm")).expanduser() / "cpu"
    processor = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line.lower()
         or line.startswith("Features")),
        platform.machine(),
    )  # fmt: skip
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    known = "\n".join((*compiler, version.stdout, *FLAGS, processor, platform.platform()))
    source = SOURCE.read_bytes() + INCLUDED.read_bytes()
    return folder / f"norm-{hashlib.sha256(source + known.encode()).hexdigest()[:16]}.so"


def load(path: Path) -> ctypes.CDLL | None:
    """The library `path`; None where there is none, or a damaged one.

    Raises:
        OSError: it is not to be trusted, or does not load.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
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
        return ctypes.CDLL(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def compile_to(path: Path, compiler: list[str]) -> None:
    """Compile the source; `path` is never there by half."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        counts = [f"-D{name}={count}" for name, count in FIELDS.items()]
        command = [*compiler, *FLAGS, *counts, "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        subprocess.run([*command, "-lm"], check=True, capture_output=True, text=True)
        with made.open("ab") as library:
            library.write(hashlib.sha256(made.read_bytes()).digest())
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
