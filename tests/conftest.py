"""One thread for each of the test processes; without a GPU the Triton kernels are interpreted.

Both are read at the first import of torch and of triton. Extractors that runs train are kept in a
folder of this session's, which its processes share.
"""

import os
import tempfile
from importlib import import_module
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "GANNORM_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="gannorm-cache-")
    os.environ["GANNORM_CACHE"] = CACHE.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as tl  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.utils import Bunch  # noqa: E402
from triton import knobs  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def round_to_nearest_in_the_interpreter():
    """Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest, ties to even."""
    if not knobs.runtime.interpret:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            bits = torch.from_numpy(src.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16), tl.bfloat16)
        return truncate(self, src, dst_type)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc
    yield
    InterpreterBuilder.create_fp_trunc = truncate


@pytest.fixture(autouse=True, scope="session")
def interpreter_patches_once():
    """A launch makes triton.language the interpreter's, and each function that a kernel calls does
    it again, which takes longer than the function: here the launch does it for all of them."""
    if not knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    patch, launched = interpreter._patch_lang, []
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def restore() -> None:
        launched.pop().restore()

    def patch_once(fn):
        if launched:
            return SimpleNamespace(restore=lambda: None)
        launched.append(patch(both))
        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


FEW = 300  # digits, every fifth of them held out


@pytest.fixture(scope="module")
def quick_runs():
    """For tests of training alone: a sixth of the digits, read by a classifier of two steps."""
    from gannorm.metrics import features

    bunch = load_digits()
    few = Bunch(images=bunch.images[:FEW], target=bunch.target[:FEW])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("gannorm.data.digits"), "load_digits", lambda: few)
        patch.setattr(features, "STEPS", 2)
        yield
