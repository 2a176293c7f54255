"""The CPU's own kernels: every way through them against the reference, and where there are none."""

import os
import shutil
import subprocess
import sys
import warnings
from itertools import product

import pytest
import torch
from parity import EPILOGUES

import gannorm.norms.functional as G
from gannorm.norms import composed, cpu
from gannorm.norms.backend import module_for
from gannorm.norms.composed import NormSpec
from gannorm.norms.cpu import build

# (N, C, S) by what is special about it; 2,048 elements are a piece.
SHAPES = {
    "one value": (9, 6, 1),
    "narrow": (5, 6, 7),
    "short": (70, 12, 16),  # more samples than one column sum takes
    "uneven": (3, 6, 65),
    "long": (2, 6, 1500),
    "few, long": (1, 2, 5000),  # several pieces to a plane, and fewer sets than threads
    "long rows": (2, 2100, 3),  # several pieces to a row
    "many rows": (3, 20, 700),  # several stretches to a sample
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

if cpu.kernels() is None:
    pytest.skip("no C compiler here: torch ops run", allow_module_level=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rows(t):
    """(N, C, S) with its channels side by side."""
    return None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2)


def call(shape, groups, labelled, keywords, dtype, given=False):
    """forward and backward as functions of the module, the layout and a conversion."""
    torch.manual_seed(0)
    n, c, _ = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, r = ((torch.randn(shape, dtype=wide) * 2 + 0.5).to(dtype) for _ in range(3))
    w, b = (torch.randn(3 if labelled else 1, c, dtype=composed.stat_dtype(dtype)) for _ in "wb")
    labels = torch.randint(3, (n,)) if labelled else None
    after = keywords.get("residual_after_activation", False)
    activation = keywords.get("activation")
    spec = NormSpec(groups, 1e-5, activation, keywords.get("negative_slope", 0.2), after)
    residual = r if keywords.get("residual") else None
    inner = residual if activation and not after else None
    moments = (w[0].clone(), w[0].square() + 0.1) if given else None

    def run(module, layout, convert):
        x_, dy_, w_, b_ = (convert(t) for t in (layout(x), dy, w, b))
        residual_, inner_ = (None if t is None else layout(convert(t)) for t in (residual, inner))
        moments_ = moments and tuple(convert(t) for t in moments)
        with torch.no_grad():
            y, stats = module.forward(x_, w_, b_, labels, residual_, moments_, spec)
            grads = module.backward(
                dy_, x_, w_, b_, labels, inner_, stats, spec, given, need_dx=True
            )
        return y, *grads[:3], grads[3] if inner is not None else None

    return run


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch_ops(shape, layout, dtype, threads):
    lay_out = rows if layout == "rows" else torch.Tensor.contiguous
    sets = {0: True, SHAPES[shape][1]: SHAPES[shape][2] > 1, 2: True, 1: True}
    kinds = [g for g, possible in sets.items() if possible]
    for groups, labelled, keywords in product(kinds, (False, True), EPILOGUES):
        for given in (False, True) if groups == 0 else (False,):
            run = call(SHAPES[shape], groups, labelled, keywords, dtype, given)
            expected = run(composed, torch.Tensor.contiguous, torch.Tensor.double)
            found = []
            for count in (1, 2):
                threads(count)
                found.append(run(cpu, lay_out, lambda t: t))
            for one, two, e in zip(*found, expected, strict=True):
                assert (one is None) == (two is None) == (e is None)
                if one is not None:
                    assert torch.equal(one, two)  # the threads change nothing
                    scale = max(1.0, float(e.abs().max()))
                    assert float((one - e).abs().max()) <= TOLERANCE[dtype] * scale, groups


def test_bfloat16_rounds_ties_to_even_and_keeps_nan():
    x = torch.randn(4, 2, 600).bfloat16()
    x[0, 0, 0] = float("nan")
    given = torch.zeros(2), torch.ones(2)
    spec = NormSpec(0, 0.0)
    for gain in (1.0, 1.00390625, 1.01171875, 3.3e38):  # halfway between two bfloat16, up and down
        w = torch.full((1, 2), gain)
        y, _ = cpu.forward(x, w, None, None, None, given, spec)
        torch.testing.assert_close(y, (x.float() * gain).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_masked_gradient_may_be_infinite():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], requires_grad=True)
    found, expected = (
        torch.autograd.grad(y.pow(0.5).sum(), x)[0]  # an infinite slope at 0
        for y in (G.instance_norm(x, activation="relu"), G.instance_norm(x).relu())
    )
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-3, -0.3, 7.0, 1e6])
@pytest.mark.parametrize("size", [4, 100, 3000])
def test_a_constant_plane_becomes_exactly_the_bias(size, value, dtype):
    x = torch.full((2, 1, size), value, dtype=dtype, requires_grad=True)
    w, b = torch.full((1,), 1e6, dtype=dtype), torch.zeros(1, dtype=dtype, requires_grad=True)
    for norm in (
        lambda: G.instance_norm(x, weight=w, bias=b, activation="relu"),
        lambda: G.batch_norm(x, None, None, w, b, True, activation="relu"),
    ):
        y = norm()
        assert torch.equal(y, torch.zeros_like(y))
        assert float(torch.autograd.grad(y.sum(), b)[0]) == 0  # on the ReLU's flat side


def test_float64_far_from_zero():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 50, dtype=torch.float64)
    far = x + 1e12
    exact = far - 1e12
    torch.testing.assert_close(G.instance_norm(far), G.instance_norm(exact), rtol=0, atol=1e-7)


def test_running_statistics_take_the_batchs_whole():
    x = torch.randn(8, 3, 8, 8) * 1e-4
    mean, var = torch.full((3,), 1e3), torch.full((3,), 1e3)
    G.batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(var, x.var((0, 2, 3)))


def test_labels_that_change_behind_the_check(monkeypatch):
    monkeypatch.setattr(G, "check_label_values", lambda *_: None)
    table = torch.rand(4, 3)
    labels = torch.tensor([0, 10**9])
    with pytest.raises(IndexError, match=r"a label lies outside of the table's rows 0\.\.3"):
        G.conditional_instance_norm(torch.randn(2, 3, 8, 8), labels, table, table)


def test_memory_of_an_unusual_kind():
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with torch.device("meta"):  # what is made without a device is made there
        y = G.instance_norm(x)
    torch.testing.assert_close(y, G.instance_norm(x))
    (dx,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))
    assert torch.equal(dx, torch.zeros_like(x))
    w, z = torch.randn(3), torch.randn(1, 3, dtype=torch.complex64)
    torch.testing.assert_close(
        G.instance_norm(x, weight=torch._neg_view(w)), G.instance_norm(x, weight=-w)
    )
    moments = z.conj().imag[0], torch.ones(3)
    torch.testing.assert_close(
        G.batch_norm(x, *moments), G.batch_norm(x, *(t.clone() for t in moments))
    )
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda t: t.mT if t.dim() > 1 else t
    )
    grads = []
    for hooked in (True, False):
        with hooks if hooked else torch.enable_grad():
            y = G.group_norm(x, 3, activation="relu")
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_silu_of_the_far_left():
    x, far = torch.randn(1, 1, 8), torch.full((1, 1, 8), -1e38)
    y = G.instance_norm(x, residual=far, activation="silu")
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_channels_last_is_worked_on_as_it_lies(norm):
    torch.manual_seed(0)
    x = torch.randn(5, 6, 7, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    w, b = torch.randn(6), torch.randn(6)
    op = {
        "instance": lambda x: G.instance_norm(x, weight=w, bias=b, activation="relu"),
        "group": lambda x: G.group_norm(x, 2, w, b, activation="relu"),
        "batch": lambda x: G.batch_norm(x, None, None, w, b, True, activation="relu"),
    }[norm]
    assert cpu.is_dense(x)
    assert cpu._dense(x).data_ptr() == cpu._dense(x, x).data_ptr() == x.data_ptr()
    dy = torch.randn(5, 6, 7, 9)
    y = op(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.stride() == dx.stride() == x.stride()
    plain = x.detach().contiguous().requires_grad_()
    expected = op(plain)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (expected_dx,) = torch.autograd.grad(expected, plain, dy)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [0, 6, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -3e38])
def test_rows_with_values_out_of_range(value, groups):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 300)
    x[1, 2, 30:33] = value
    spec = NormSpec(groups, 1e-5)
    (y, stats), (expected, as_planes) = (
        cpu.forward(t, None, None, None, None, None, spec) for t in (rows(x), x)
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    for found, one in zip(stats[[0, 2, 3]], as_planes[[0, 2, 3]], strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [0, 6, 2])
def test_rows_far_from_zero(groups, dtype):
    torch.manual_seed(0)
    far = torch.randn(3, 6, 500, dtype=dtype) + (1e6 if dtype == torch.float32 else 1e12)
    spec = NormSpec(groups, 1e-5)
    y, _ = cpu.forward(rows(far), None, None, None, None, None, spec)
    expected, _ = composed.forward(
        far.double() - float(far[0, 0, 0]), None, None, None, None, None, spec
    )
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    constant, _ = cpu.forward(rows(torch.full_like(far, 0.3)), None, None, None, None, None, spec)
    assert torch.equal(constant, torch.zeros_like(constant))


@pytest.mark.parametrize("size", [512, 2100])
def test_long_rows_keep_the_digits_of_the_variance(size):
    torch.manual_seed(0)
    x = torch.randn(2, size, 120) + 50
    x[:, :, :2] = 0  # what the sums are taken around is unlike the rest
    _, stats = cpu.forward(rows(x), None, None, None, None, None, NormSpec(size, 1e-5))
    expected = x.double().var(2, correction=0)
    assert float((stats[3] / expected - 1).abs().max()) < 3e-6


def test_overlapping_windows():
    torch.manual_seed(0)
    x = torch.randn(40).unfold(0, 30, 1)  # 11 windows, one element further each
    torch.testing.assert_close(
        G.layer_norm(x, 30), torch.nn.functional.layer_norm(x, (30,)), rtol=1e-5, atol=1e-5
    )
    for strides in ((4, 16, 4, 1), (0, 16, 4, 1), (4, 1, 8, 2)):
        w = torch.randn(80).as_strided((3, 2, 4, 4), strides).requires_grad_()
        plain = w.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for norm in (
            lambda t: G.group_norm(t, 1),
            lambda t: G.batch_norm(t, None, None, training=True),
        ):
            (dx,), (expected,) = (
                torch.autograd.grad(norm(t).square().mul(torch.arange(4.0)).sum(), t)
                for t in (w, plain)
            )
            torch.testing.assert_close(norm(w), norm(plain), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)


def test_tensors_without_memory_are_zeros():
    torch.manual_seed(0)
    x, zeros = torch.randn(4, 3, 5, 5), torch._efficientzerotensor((3,))
    assert float(G.instance_norm(x, weight=zeros).abs().max()) == 0
    labels = torch._efficientzerotensor((4,), dtype=torch.int64)
    table = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(
        G.conditional_instance_norm(x, labels, table, None).square().sum(), table
    )
    assert float(grad[0].abs().min()) > 0 and float(grad[1].abs().max()) == 0


def test_labels_without_tables_do_not_matter():
    x = torch.randn(2, 3, 4, 4)
    y = G.conditional_instance_norm(x, torch.tensor([-1, 9]), None, None)
    assert torch.equal(y, G.instance_norm(x))


def test_a_slice_of_the_batch_is_read_in_place():
    wide = torch.randn(8, 4, 5, 5)
    x = wide[::2]
    torch.testing.assert_close(G.batch_norm(x, None, None, training=True),
                               G.batch_norm(x.clone(), None, None, training=True))  # fmt: skip
    assert cpu._dense(x.flatten(2)).data_ptr() == wide.data_ptr()


def without(tmp_path, **environment):
    """What a fresh process says of a norm of ones with these variables set."""
    code = (
        "import torch, gannorm.functional as G; from gannorm.norms.backend import module_for\n"
        "x = torch.ones(2, 3, 4, 4)\n"
        "print(module_for(x).__name__, float(G.instance_norm(x).abs().sum()))"
    )
    return python(code, tmp_path, **environment)


def python(code, tmp_path, **environment):
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_without_a_compiler_torch_ops_run(tmp_path):
    said, warned = without(tmp_path, CC="no-such-compiler")
    assert said == "gannorm.norms.composed 0.0" and "Warning" not in warned


def test_a_compiler_that_fails_is_named(tmp_path):
    said, warned = without(tmp_path, CC="false")
    assert said == "gannorm.norms.composed 0.0"
    assert "false could not compile norm.c" in warned


COMPILER = ["cc"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled") / "library.so"
    build.compile_to(path, COMPILER)
    return path


@pytest.fixture
def library(compiled, tmp_path, monkeypatch):
    """A library just compiled into a cache of its own."""
    monkeypatch.setenv("GANNORM_CACHE", str(tmp_path / "cache"))
    path = build.compiled_path(COMPILER)
    path.parent.mkdir(mode=0o700, parents=True)
    shutil.copy(compiled, path)
    return path


def test_compiled_once_for_each_source_and_compiler(library, monkeypatch, tmp_path):
    assert build.load(library) is not None and build.compiled_path(COMPILER) == library
    assert [p.name for p in library.parent.iterdir()] == [library.name]  # and nothing half-made
    other = tmp_path / "cc"  # the same name, another version
    other.write_text("#!/bin/sh\necho another 1.0\n")
    other.chmod(0o700)
    assert build.compiled_path([str(other)]) != library
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert build.compiled_path(COMPILER) != library


@pytest.mark.parametrize(
    "damage",
    ["flipped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("truncated", "empty", "text"))],
)
def test_a_damaged_library_is_compiled_anew(damage, library, tmp_path):
    whole = library.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    library.write_bytes({
        "truncated": whole[: len(whole) // 2], "empty": b"", "flipped": bytes(flipped),
        "text": b"no library at all",
    }[damage])  # fmt: skip
    assert build.load(library) is None
    cache = str(tmp_path / "cache")
    said, warned = without(tmp_path, GANNORM_CACHE=cache, PATH=os.environ["PATH"])
    assert said.startswith("gannorm.norms.cpu ")
    assert "Warning" not in warned and build.load(library) is not None


def test_a_library_that_others_can_write_is_not_loaded(library, tmp_path):
    cache = str(tmp_path / "cache")
    for path, mode in ((library, 0o722), (library.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(PermissionError, match="others can write to"):
            build.load(library)
        said, warned = without(tmp_path, GANNORM_CACHE=cache, PATH=os.environ["PATH"])
        assert said.startswith("gannorm.norms.composed")
        assert f"others can write to {path} (owner" in warned and "GANNORM_CACHE" in warned
        path.chmod(before)
    target = library.with_name("elsewhere")
    library.rename(target)
    library.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        build.load(library)
    library.parent.rename(tmp_path / "mine")
    library.parent.symlink_to(tmp_path / "mine")
    with pytest.raises(PermissionError, match=f"others can write to {library.parent}"):
        build.load(target)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_library_of_another_user_is_not_loaded(library):
    os.chown(library, 12345, -1)
    with pytest.raises(PermissionError, match="owner 12345"):
        build.load(library)


@pytest.mark.parametrize("field", build.FIELDS)
def test_another_layout_does_not_compile(field, library, monkeypatch):
    monkeypatch.setitem(build.FIELDS, field, build.FIELDS[field] + 1)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build.compile_to(library, COMPILER)
    assert field.lower() in caught.value.stderr


def test_imaginary_parts_and_expanded_gradients():
    z = torch.randn(2, 3, 5, 5, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(G.instance_norm(x), G.instance_norm(-z.imag))
    leaf = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = G.batch_norm(leaf, None, None, torch.ones(3), None, True, activation="relu")
    (one,) = torch.autograd.grad(y, leaf, torch.ones(()).expand(y.shape), retain_graph=True)
    (two,) = torch.autograd.grad(y, leaf, torch.ones(y.shape))
    assert torch.equal(one, two)


def test_other_kinds_go_to_torch_ops():
    assert module_for(torch.empty(0, 3, 4)).__name__ == "gannorm.norms.composed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module_for(torch.ones(2, 3, 4)).__name__ == "gannorm.norms.cpu"


def test_memory_is_kept(tmp_path):
    code = (
        "import resource, torch; from gannorm.norms import cpu\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.empty(2**24).fill_(1)\n"  # 64 MB: 16,384 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); given_back = faults(); cpu.keep_memory()\n"
        "for _ in range(30): faults()\n"  # until the small blocks in between have their places
        "print(given_back, faults())"
    )
    given_back, kept = map(int, python(code, tmp_path)[0].split())
    assert given_back > 10_000 and kept < 1000
