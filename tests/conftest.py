"""One thread for each of the test processes; without a GPU the Triton kernels are interpreted.

Both are read at the first import of torch and of triton. Extractors that runs train are kept in a
folder of this session's, which its processes share.
"""

import gc
import os
import tempfile
from collections import Counter
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


@pytest.fixture
def in_float64(monkeypatch):
    """Networks, images and losses: float32 would hide what differs."""
    widened = {torch.bool: torch.float32}  # a fused Adam's flag stays float32
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t.to(widened.get(t.dtype, torch.float64)))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


LONG = (
    "loop", "train", "export_command", "cpu", "signals", "faults", "sync", "config", "export",
    "gpu_command", "nonfinite", "ops", "task_figures", "killed", "compile", "benchmarks", "weights",
    "launch", "tables", "functional", "sampling", "evaluation", "tasks", "imports", "resume",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the tests marked so most cases are slow. The files that take longest come first: the
    processes then end together."""
    cases: Counter[str] = Counter()
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % sampled.args[0]:
                item.add_marker("slow")
            cases[name] += 1
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(autouse=True, scope="module")
def the_collector_passes_over_modules():
    """Each look through all that was imported takes 0.3 s, and there is one every few tests."""
    gc.freeze()


FEW = 300  # digits, every fifth of them held out


@pytest.fixture(scope="module")
def quick_runs():
    """For tests of training alone: see `hasten`."""
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        yield


def hasten(patch: pytest.MonkeyPatch) -> None:
    """A sixth of the digits, read by a classifier of two steps."""
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    from gannorm.metrics import features

    bunch = load_digits()
    few = Bunch(images=bunch.images[:FEW], target=bunch.target[:FEW])
    patch.setattr(import_module("gannorm.data.digits"), "load_digits", lambda: few)
    patch.setattr(features, "STEPS", 2)
