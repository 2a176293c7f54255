"""Wrong arguments are refused by name; the backend is picked as asked."""

import os
import subprocess
import sys

import pytest
import torch

from gannorm import functional as G
from gannorm import use_backend
from gannorm.backend import module_for
from gannorm.errors import RequestError

X = torch.randn(4, 6, 3, 3)
LABELS = torch.tensor([0, 1, 2, 1])
TABLE = torch.ones(3, 6)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: G.instance_norm(X.long()), TypeError, "int64"),
        (lambda: G.instance_norm(torch.randn(2, 3, 1, 1)), ValueError, r"\(2, 3, 1, 1\)"),
        (lambda: G.instance_norm(X, weight=torch.ones(5)), ValueError, r"weight.*\(6,\).*\(5,\)"),
        (lambda: G.instance_norm(X, use_input_stats=False), ValueError, "running_mean"),
        (lambda: G.group_norm(X, 4), ValueError, "num_groups=4.*6 channels"),
        (lambda: G.batch_norm(X, None, None), ValueError, "training=False"),
        (
            lambda: G.batch_norm(X, torch.zeros(5), None, training=True),
            ValueError,
            r"running_mean.*\(6,\)",
        ),
        (lambda: G.layer_norm(X, (4, 3)), ValueError, r"normalized_shape=\(4, 3\)"),
        (
            lambda: G.conditional_instance_norm(X, LABELS.int(), TABLE, TABLE),
            TypeError,
            "int64.*int32",
        ),
        (
            lambda: G.conditional_instance_norm(X, LABELS[:3], TABLE, TABLE),
            ValueError,
            r"shape \(4,\)",
        ),
        (
            lambda: G.conditional_instance_norm(X, LABELS - 1, TABLE, TABLE),
            ValueError,
            r"0\.\.2 .*-1\.\.1",
        ),
        (lambda: G.conditional_instance_norm(X, LABELS + 1, TABLE, TABLE), ValueError, r"1\.\.3"),
        (
            lambda: G.conditional_instance_norm(X, LABELS, TABLE, TABLE[:2]),
            ValueError,
            "bias must have shape",
        ),
        (lambda: G.group_norm(X, 2, torch.ones(6, device="meta")), ValueError, "weight is on meta"),
        (lambda: G.group_norm(X, 2, residual=X.to("meta")), ValueError, "residual is on meta"),
        (
            lambda: G.conditional_instance_norm(X, LABELS.to("meta"), TABLE, TABLE),
            ValueError,
            "labels is on meta, the input on cpu",
        ),
        (lambda: G.group_norm(X, 2, activation="gelu"), ValueError, "gelu"),
        (lambda: G.group_norm(X, 2, residual=X[:2]), ValueError, "residual"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_unknown_backend_is_refused():
    with pytest.raises(RequestError, match="cuda.*auto, triton, torch"), use_backend("cuda"):
        pass


def test_use_backend_nests_and_restores():
    with use_backend("torch"):
        with use_backend("triton"):
            assert module_for(X).__name__ == "gannorm.kernels"
        assert module_for(X).__name__ == "gannorm.reference"
    assert (module_for(X).__name__ == "gannorm.kernels") == X.is_cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backend is there")
def test_triton_without_gpu_or_interpreter_is_refused():
    code = "from gannorm import use_backend\nwith use_backend('triton'): pass"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0 and "TRITON_INTERPRET=1" in result.stderr


def test_importing_does_not_import_triton():
    """A machine without a GPU, or without Triton, never pays for it."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import gannorm; x = torch.randn(2, 3, 4, 4)\n"
        "gannorm.InstanceNorm2d(3)(x)\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] == 'triton'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
