"""One thread for each of the test processes; without a GPU the Triton kernels are interpreted.

Both are read at the first import of torch and of triton. Extractors that runs train are kept in a
folder of this session's, which its processes share.
"""

import os
import tempfile
from importlib import import_module

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "GANNORM_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="gannorm-cache-")
    os.environ["GANNORM_CACHE"] = CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton import knobs  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def the_interpreter_as_a_gpu_rounds():
    """And faster: each launch makes triton.language the interpreter's once."""
    if not knobs.runtime.interpret:
        yield
        return
    from benchmarks.gpu import rehearsal

    with (
        rehearsal.rounding_to_nearest(),
        rehearsal.patching_once(),
        rehearsal.without_overflow_checks(),
    ):
        yield


LONG = (
    "launch", "loop", "gpu_command", "cpu", "ops", "compile", "train", "benchmarks", "examples",
    "faults", "task_figures", "inference", "inspection", "norm_study", "weights", "export_command",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The files that take longest come first: the processes then end together."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


FEW = 300  # digits, every fifth of them held out


@pytest.fixture(scope="module")
def quick_runs():
    """For tests of training alone: a sixth of the digits, read by a classifier of two steps."""
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    from gannorm.metrics import features

    bunch = load_digits()
    few = Bunch(images=bunch.images[:FEW], target=bunch.target[:FEW])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("gannorm.data.digits"), "load_digits", lambda: few)
        patch.setattr(features, "STEPS", 2)
        yield
