"""torch.compile without a break on both backends, opcheck, torch.func, forward-mode AD."""

import subprocess
import sys

import pytest
import torch
from pairs import pairs
from parity import close, leaf
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import gannorm
from gannorm import use_backend
from gannorm.norms import functional as G
from gannorm.norms import ops

LABELS = torch.tensor([0, 2, 1, 1])
BACKENDS = ("torch", "triton")


def after(residual):
    return {"residual": residual, "residual_after_activation": True}


COMPILED = {
    "instance": lambda x, w, b, r: G.instance_norm(x, weight=w[0], bias=b[0], activation="silu"),
    "group": lambda x, w, b, r: G.group_norm(x, 2, w[0], b[0], residual=r),
    "inner": lambda x, w, b, r: G.instance_norm(x, activation="leaky_relu", residual=r),
    "batch": lambda x, w, b, r: G.batch_norm(
        x, None, None, w[0], b[0], True, activation="relu", **after(r)
    ),
    "eval": lambda x, w, b, r: G.batch_norm(x, torch.zeros(6), torch.ones(6), w[0], b[0]),
    "conditional_batch": lambda x, w, b, r: G.conditional_batch_norm(
        x, LABELS[: x.shape[0]], None, None, w, b, True, activation="relu"
    ),
    "conditional_instance": lambda x, w, b, r: G.conditional_instance_norm(
        x, LABELS[: x.shape[0]], w, b, activation="leaky_relu", residual=r
    ),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("op,dynamic,backend", pairs(COMPILED, [False, True], BACKENDS))
def test_compiled_equals_eager(backend, dynamic, op):
    torch.manual_seed(0)
    torch._dynamo.reset()
    w, b = leaf(3, 6, dtype=torch.float32), leaf(3, 6, dtype=torch.float32)
    with use_backend(backend):
        compiled = torch.compile(COMPILED[op], fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n, size in ((4, 5), (3, 6)):
            x, r = (leaf(n, 6, size, 4, dtype=torch.float32) for _ in range(2))
            a, e = compiled(x, w, b, r), COMPILED[op](x, w, b, r)
            close(a, e, 1e-5)
            for p, q in zip(grads(a, x, w, b, r), grads(e, x, w, b, r), strict=True):
                assert (p is None) == (q is None)
                if p is not None:
                    close(p, q, 1e-5)


@pytest.mark.parametrize("op", COMPILED)
def test_compiled_code_calls_the_kernels(op):
    """On Triton the graph holds the registered operator, not the composition of torch ops."""
    torch._dynamo.reset()
    w, b, x, r = torch.ones(3, 6), torch.ones(3, 6), torch.randn(4, 6, 5, 4), torch.ones(4, 6, 5, 4)
    targets = []

    def look(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with use_backend("triton"):
        torch.compile(COMPILED[op], fullgraph=True, backend=look)(x, w, b, r)
    assert "gannorm.norm.default" in targets


def grads(y, *leaves):
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    return torch.autograd.grad(y, leaves, dy, allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_layer_tracks_its_statistics(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    with use_backend(backend):
        eager = gannorm.ConditionalBatchNorm2d(6, 3, activation="relu")
        layer = gannorm.ConditionalBatchNorm2d(6, 3, activation="relu")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = torch.randn(4, 6, 3, 3)
            close(compiled(x, LABELS), eager(x, LABELS), 1e-5)
        for name, value in eager.state_dict().items():
            close(layer.state_dict()[name], value, 1e-6)
        layer.eval(), eager.eval()
        close(compiled(x, LABELS), eager(x, LABELS), 1e-5)


INDUCTOR = """
import torch, gannorm
torch.manual_seed(0)
norm = gannorm.InstanceNorm2d(4, affine=True, activation="leaky_relu")
x = torch.randn(2, 4, 8, 8, requires_grad=True)
y, e = torch.compile(norm, fullgraph=True)(x), norm(x)
dy = torch.linspace(-1, 1, y.numel()).view_as(y)
a, b = (torch.autograd.grad(t, x, dy)[0] for t in (y, e))
torch.testing.assert_close(y, e, rtol=0, atol=1e-5)
torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_inductor_compiles_the_fallback():
    """In a process of its own: its C++ builder minds what else was imported before."""
    command = [sys.executable, "-c", INDUCTOR]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(given, full):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, requires_grad=True)
    table, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 2])
    stats = (torch.randn(4), torch.rand(4)) if given else (None, None)
    rest = (table, table, labels, x) if full else (None, None, None, None)
    groups = 0 if given else 4
    arguments = (x, *rest, *stats, groups, 1e-5, "relu" if full else None, 0.2, False)
    library.opcheck(torch.ops.gannorm.norm.default, arguments)
    y, stats = ops.norm(*(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments))
    arguments = (y, x.detach(), *(None if t is None else t.detach() for t in rest), stats)
    constants = (groups, 1e-5, "relu" if full else None, 0.2, given)
    library.opcheck(torch.ops.gannorm.norm_backward.default, (*arguments, *constants))


def test_compiled_labels_out_of_range_are_refused():
    torch._dynamo.reset()
    table = torch.ones(3, 6)
    norm = torch.compile(
        lambda x, y: G.conditional_instance_norm(x, y, table, table),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    x = torch.randn(4, 6, 3, 3)
    norm(x, LABELS)
    with pytest.raises(RuntimeError, match=r"labels must lie in 0\.\.2"):
        norm(x, LABELS - 1)


TWINS = {
    "instance": (G.instance_norm, F.instance_norm),
    "group": (lambda x: G.group_norm(x, 3), lambda x: F.group_norm(x, 3)),
    "batch": (
        lambda x: G.batch_norm(x, None, None, training=True),
        lambda x: F.batch_norm(x, None, None, training=True),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", TWINS)
def test_torch_func_and_forward_mode(backend, op):
    torch.manual_seed(0)
    x, t = torch.randn(4, 6, 3, 3).double(), torch.randn(4, 6, 3, 3).double()
    many = torch.randn(2, 4, 6, 3, 3).double()
    func = torch.func
    with use_backend(backend):
        ours, theirs = TWINS[op]
        for a, b in zip(func.jvp(ours, (x,), (t,)), func.jvp(theirs, (x,), (t,)), strict=True):
            close(a, b, 1e-10)
        loss = [lambda x, f=f: f(x).pow(3).sum() for f in (ours, theirs)]
        close(func.grad(loss[0])(x), func.grad(loss[1])(x), 1e-10)
        close(func.vmap(ours)(many), torch.stack([theirs(m) for m in many]), 1e-10)
        each = torch.stack([func.grad(loss[1])(m) for m in many])
        close(func.vmap(func.grad(loss[0]))(many), each, 1e-9)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, t)
            tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent.clone()
    close(tangent, func.jvp(theirs, (x,), (t,))[1], 1e-10)
    with use_backend(backend), torch.no_grad():
        close(func.vmap(ours)(many), torch.stack([theirs(m) for m in many]), 1e-10)
        close(func.jvp(ours, (x,), (t,))[1], tangent, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_many_outputs_at_once(backend, dtype):
    x, r = (leaf(4, 6, 3, 3, dtype=dtype) for _ in range(2))
    w = leaf(3, 6, dtype=torch.float32)
    with use_backend(backend):
        y = G.conditional_batch_norm(
            x, LABELS, None, None, w, None, True, activation="relu", residual=r
        )
    dy = torch.randn(3, *y.shape, dtype=dtype)
    together = torch.autograd.grad(y, (x, w, r), dy, is_grads_batched=True, retain_graph=True)
    for k, one in enumerate(dy):
        for a, b in zip(
            together, torch.autograd.grad(y, (x, w, r), one, retain_graph=True), strict=True
        ):
            close(a[k], b, 5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_for_every_sample_and_label(backend):
    def loss(w, x, y):
        return G.conditional_instance_norm(x[None], y[None], w, w).pow(3).sum()

    w, x = torch.randn(3, 6), torch.randn(4, 6, 3, 3)
    with use_backend(backend):
        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(w, x, LABELS)
        for k in range(4):
            close(found[k], torch.func.grad(loss)(w, x[k], LABELS[k]), 1e-5)


@pytest.mark.parametrize("op", TWINS)
def test_inputs_without_values(op):
    """Fake tensors, make_fx and torch.jit.trace: nothing may depend on what is in the input."""
    ours, x = TWINS[op][0], torch.randn(4, 6, 3, 3)
    with FakeTensorMode() as fake:
        assert ours(fake.from_tensor(x)).shape == x.shape
    close(make_fx(lambda x: ours(x))(torch.randn(4, 6, 3, 3))(x), ours(x), 1e-5)
    with torch.no_grad():
        close(torch.jit.trace(lambda x: ours(x), torch.randn(4, 6, 3, 3))(x), ours(x), 1e-5)


@pytest.mark.parametrize("op", ["conditional_batch", "conditional_instance"])
def test_labels_without_values(op):
    def ours(x, y):
        if op == "conditional_batch":
            return G.conditional_batch_norm(x, y, None, None, w, w, True)
        return G.conditional_instance_norm(x, y, w, w)

    w, x = torch.randn(3, 6), torch.randn(4, 6, 3, 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert ours(fake.from_tensor(x), fake.from_tensor(LABELS)).shape == x.shape
    with torch.no_grad():
        for made in (
            make_fx(ours)(torch.randn(4, 6, 3, 3), LABELS.flip(0)),
            torch.jit.trace(ours, (torch.randn(4, 6, 3, 3), LABELS.flip(0))),
        ):
            close(made(x, LABELS), ours(x, LABELS), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_empty_batch_has_gradients(backend):
    torch._dynamo.reset()
    x = leaf(0, 6, 3, 3, dtype=torch.float32)
    with use_backend(backend):
        norm = torch.compile(G.instance_norm, backend="aot_eager")
        (dx,) = torch.autograd.grad(norm(x).sum(), x)
    assert dx.shape == x.shape
