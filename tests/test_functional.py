"""Wrong arguments are refused by name; the backend is picked as asked."""

import os
import subprocess
import sys

import pytest
import torch
from parity import close

from gannorm import use_backend
from gannorm.errors import RequestError
from gannorm.norms import functional as G
from gannorm.norms.backend import module_for

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


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    "dim", [0, -1, (0, 2, 3), [2, 3], (-1, -2), (3, 0), torch.Size([1])], ids=str
)
def test_moments(dim, keepdim):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, 5).double().requires_grad_()
    mean, var = G.moments(x, dim, keepdim)
    dims = dim if isinstance(dim, int) else tuple(dim)
    expected = torch.mean(x, dims, keepdim), torch.var(x, dims, correction=0, keepdim=keepdim)
    for a, e in zip((mean, var), expected, strict=True):
        close(a, e, 1e-12)
        (da,) = torch.autograd.grad(a.pow(3).sum(), x, retain_graph=True)
        (de,) = torch.autograd.grad(e.pow(3).sum(), x, retain_graph=True)
        close(da, de, 1e-12)
    step = torch.compile(G.moments, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    close(step(x, dim, keepdim)[1], var, 1e-12)


@pytest.mark.parametrize("dim", [0, 1, (0, 1), (0, 2), (2,)], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 0, 3)], ids=str)
def test_moments_of_nothing(shape, dim):
    x = torch.ones(shape)
    for a, e in zip(G.moments(x, dim), (x.mean(dim), x.mean(dim)), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.parametrize(
    "dim,error,words",
    [
        ((), ValueError, r"dim=\(\).*\(0, 1, 2, 3\)"),
        ((0, -4), ValueError, r"dim=\(0, -4\).*twice.*\(4, 6, 3, 3\)"),
        ([1, 4], ValueError, r"dim=\[1, 4\].*-4\.\.3"),
        (-5, ValueError, r"dim=-5.*-4\.\.3"),
        (None, TypeError, "dim=None"),
        ("0", TypeError, "dim='0'"),
    ],
)
def test_dimensions_that_moments_refuses(dim, error, words):
    with pytest.raises(error, match=f"moments: .*{words}"):
        G.moments(X, dim)


STAT = torch.ones(1, 6, 1, 1)


def test_batch_normalization():
    torch.manual_seed(0)
    mean, scale, offset = (torch.randn(1, 6, 1, 1) for _ in range(3))
    var = torch.rand(1, 6, 1, 1)
    y = G.batch_normalization(X, mean, var, offset, scale, 1e-3)
    flat = [t.flatten() for t in (mean, var, scale, offset)]
    close(y, torch.nn.functional.batch_norm(X, *flat, eps=1e-3), 1e-5)
    plain = G.batch_normalization(X, mean, var, None, None, 1e-3)
    close(y, plain * scale + offset, 1e-5)
    rows = torch.randn(4, 6, 1, 1)  # per sample, and fewer dimensions than the input
    assert G.batch_normalization(X, rows, var[0], None, rows, 1e-3).shape == X.shape


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"x": X.int()}, TypeError, "input.*int32.*float"),
        ({"mean": torch.ones(6)}, ValueError, r"mean of shape \(6,\).*\(4, 6, 3, 3\).*1, C, 1"),
        ({"variance": torch.ones(5, 1, 1)}, ValueError, r"variance of shape \(5, 1, 1\)"),
        ({"offset": torch.ones(2, 6, 1, 1)}, ValueError, r"offset of shape \(2, 6, 1, 1\)"),
        ({"scale": torch.ones(1, 6, 2, 1)}, ValueError, r"scale of shape \(1, 6, 2, 1\)"),
        ({"mean": STAT.int()}, TypeError, "mean.*int32"),
        ({"variance": None}, TypeError, "variance.*NoneType"),
        ({"offset": 0.5}, TypeError, "offset.*got float"),
        ({"scale": STAT.to("meta")}, ValueError, "scale is on meta, the input on cpu"),
    ],
)
def test_what_batch_normalization_refuses(change, error, words):
    arguments = {"x": X, "mean": STAT, "variance": STAT, "offset": STAT, "scale": STAT}
    with pytest.raises(error, match=f"batch_normalization: {words}"):
        G.batch_normalization(**arguments | change, variance_epsilon=1e-5)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
def test_layer_norm_of_nothing(shape):
    x, w = torch.ones(shape, requires_grad=True), torch.ones(shape[1:])
    y = G.layer_norm(x, shape[1:], w, w)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


def test_layer_norm_of_one_size():
    close(G.layer_norm(X, 3), torch.nn.functional.layer_norm(X, (3,)), 1e-5)


def test_unknown_backend_is_refused():
    with pytest.raises(RequestError, match="cuda.*auto, triton, cpu, torch"), use_backend("cuda"):
        pass


def test_use_backend_nests_and_restores():
    with use_backend("torch"):
        with use_backend("triton"):
            assert module_for(X).__name__ == "gannorm.kernels"
        assert module_for(X).__name__ != "gannorm.kernels"
    assert (module_for(X).__name__ == "gannorm.kernels") == X.is_cuda


@pytest.mark.parametrize("name,module", [("cpu", "norms.cpu"), ("torch", "norms.composed")])
def test_a_backend_is_what_its_name_says(name, module):
    x = torch.randn(2, 3, 4, 4)
    with use_backend(name):
        assert module_for(x).__name__ == f"gannorm.{module}"
        assert module_for(x[:0]).__name__ == "gannorm.norms.composed"  # nothing to do
    assert module_for(x).__name__ == "gannorm.norms.cpu"


def test_the_cpu_backend_refuses_what_is_elsewhere():
    class Elsewhere:
        is_meta = is_cpu = False
        device = "xpu:0"

    with use_backend("cpu"), pytest.raises(ValueError, match="'cpu' cannot run .* on xpu:0; move"):
        module_for(Elsewhere())


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=own | environment, capture_output=True, text=True
    )


def test_the_environment_says_what_auto_means():
    code = (
        "import torch, gannorm; from gannorm.norms.backend import module_for\n"
        "x = torch.randn(2, 3, 4, 4); gannorm.InstanceNorm2d(3)(x)\n"
        "print(module_for(x).__name__)\n"
        "with gannorm.use_backend('cpu'): print(module_for(x).__name__)"
    )
    done = in_a_process(code, GANNORM_BACKEND="torch")
    assert done.stdout.split() == ["gannorm.norms.composed", "gannorm.norms.cpu"], done.stderr
    wrong = in_a_process(code, GANNORM_BACKEND="gpu").stderr
    assert "GANNORM_BACKEND='gpu' is unknown; choose one of auto, triton, cpu, torch" in wrong
    missing = in_a_process(code, CC="no-such-compiler").stderr
    assert "backend='cpu': the C kernels need Linux and a working C compiler" in missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backend is there")
def test_triton_without_gpu_or_interpreter_is_refused():
    code = "from gannorm import use_backend\nwith use_backend('triton'): pass"
    result = in_a_process(code)
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
