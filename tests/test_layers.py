"""What the layers share: constructors, start values, reprs, counted batches, copies, dtypes."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from parity import close
from torch import nn
from torch.nn.utils import parametrizations

import gannorm
from gannorm.norms.base import NoNorm

KINDS = {
    "instance": lambda **kw: gannorm.InstanceNorm2d(6, affine=True, track_running_stats=True, **kw),
    "batch": lambda **kw: gannorm.BatchNorm2d(6, **kw),
    "group": lambda **kw: gannorm.GroupNorm(2, 6, **kw),
    "layer": lambda **kw: gannorm.LayerNorm2d(6, **kw),
    "conditional_instance": lambda **kw: gannorm.ConditionalInstanceNorm2d(6, 3, **kw),
    "conditional_batch": lambda **kw: gannorm.ConditionalBatchNorm2d(6, 3, **kw),
}
AVERAGES = {
    "average": lambda: gannorm.BatchNorm2d(6, momentum=None),
    "conditional average": lambda: gannorm.ConditionalBatchNorm2d(6, 3, momentum=None),
}
BATCH = ("batch", "conditional_batch")
PLAIN = ("instance", "batch", "group", "layer")
LABELS = torch.tensor([0, 2, 1, 1])


def run(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    conditional = getattr(norm, "num_classes", None)
    return norm(x, LABELS[: len(x)].to(x.device)) if conditional else norm(x)


@pytest.mark.parametrize("kind", KINDS)
def test_device_and_dtype(kind):
    norm = KINDS[kind](device="meta", dtype=torch.float64)
    for name, t in norm.state_dict().items():
        assert t.device.type == "meta", name
        assert t.dtype == (torch.int64 if name == "num_batches_tracked" else torch.float64)
    assert run(norm, torch.ones(4, 6, 3, 3, device="meta")).shape == (4, 6, 3, 3)
    # As deferred construction does it: memory with anything in it, then the start values.
    norm = norm.to_empty(device="cpu")
    for t in (*norm.parameters(), *norm.buffers()):
        t.data.fill_(7)
    norm.reset_parameters()
    for name, t in KINDS[kind]().state_dict().items():
        close(norm.state_dict()[name].to(t.dtype), t, 0)


@pytest.mark.parametrize("name", ["InstanceNorm2d", "BatchNorm2d", "GroupNorm"])
def test_constructors_begin_as_torchs(name):
    def parameters(kind):
        found = inspect.signature(kind.__init__).parameters.values()
        return {p.name: (p.kind, p.default) for p in found}

    ours, theirs = parameters(getattr(gannorm, name)), parameters(getattr(nn, name))
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    assert list(ours)[: len(theirs)] == list(theirs)
    assert ours["bias"][1] is True and "weight_init" in ours  # in torch from 2.12 on


@pytest.mark.parametrize("kind", PLAIN)
def test_without_bias(kind):
    torch.manual_seed(0)
    norm = KINDS[kind](bias=False, weight_init=(2.0, 0.5))
    assert norm.bias is None and "bias" not in norm.state_dict()
    x = torch.randn(4, 6, 3, 3)
    plain = KINDS[kind]()
    close(norm(x), plain(x) * norm.weight.view(1, 6, 1, 1), 1e-5)
    norm.reset_parameters()
    assert repr(norm).count("bias=False") == 1
    if "bias" in inspect.signature(nn.GroupNorm).parameters:
        theirs = nn.GroupNorm(2, 6, bias=False)
        gannorm.GroupNorm(2, 6, bias=False).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_weight_init(kind):
    torch.manual_seed(0)
    many = torch.cat([KINDS[kind](weight_init=(2.0, 0.1)).weight.flatten() for _ in range(40)])
    assert abs(many.mean() - 2) < 0.05 and 0.08 < many.std() < 0.12
    norm = KINDS[kind]()
    assert (norm.weight == 1).all() and (norm.bias == 0).all()
    with pytest.raises(ValueError, match=r"weight_init=\(1, -0.1\).*standard deviation"):
        KINDS[kind](weight_init=(1, -0.1))
    with pytest.raises(ValueError, match=r"weight_init=0.02.*\(mean, standard deviation\)"):
        KINDS[kind](weight_init=0.02)


def test_weight_init_without_a_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight_init=\(1, 0.02\).*affine=True"):
        gannorm.InstanceNorm2d(6, weight_init=(1, 0.02))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_seed_gives_the_random_numbers_of_torchs_twin(kind):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    KINDS[kind]()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_values_are_refused_when_a_layer_is_built(kind):
    with pytest.raises(ValueError, match="activation='gelu'.*'leaky_relu'"):
        KINDS[kind](activation="gelu")
    if kind in BATCH:
        with pytest.raises(ValueError, match="var_estimator='sample'.*'unbiased', 'biased'"):
            KINDS[kind](var_estimator="sample")
        with pytest.raises(ValueError, match="degenerate='zero'.*'raise', 'beta'"):
            KINDS[kind](degenerate="zero")


def test_no_norm():
    with pytest.raises(ValueError, match="activation='gelu'"):
        NoNorm("gelu", 0.2, False)
    x, skip = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(NoNorm("relu", 0.2, False)(x, residual=skip), (x + skip).relu())
    assert torch.equal(NoNorm("silu", 0.2, True)(x, residual=skip), nn.functional.silu(x) + skip)
    assert repr(NoNorm("leaky_relu", 0.3, True)) == (
        "NoNorm(activation=leaky_relu(0.3), residual_after_activation=True)"
    )


def test_reprs():
    assert repr(gannorm.LayerNorm2d(4)).startswith("LayerNorm2d(4, eps=1e-05, affine=True")
    assert repr(gannorm.GroupNorm(2, 4)).startswith("GroupNorm(2, 4, eps=1e-05, affine=True")
    assert repr(gannorm.ConditionalInstanceNorm2d(4, 3, activation="relu")) == (
        "ConditionalInstanceNorm2d(4, num_classes=3, eps=1e-05, activation=relu)"
    )
    assert repr(gannorm.ConditionalBatchNorm2d(4, 3, momentum=None, weight_init=(1, 0.02))) == (
        "ConditionalBatchNorm2d(4, num_classes=3, eps=1e-05, momentum=None, "
        "track_running_stats=True, weight_init=(1, 0.02))"
    )
    plain = repr(gannorm.BatchNorm2d(4))
    assert "momentum=0.1" in plain and "track_running_stats=True" in plain
    full = gannorm.BatchNorm2d(
        4, var_estimator="biased", degenerate="beta", activation="silu",
        residual_after_activation=True,
    )  # fmt: skip
    assert repr(full) == plain[:-1] + (
        ", var_estimator=biased, degenerate=beta, activation=silu, residual_after_activation=True)"
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", BATCH)
def test_a_refused_batch_is_not_counted(kind, momentum):
    torch.manual_seed(0)
    norm = KINDS[kind](momentum=momentum)
    batches = [torch.randn(4, 6, 3, 3) + k for k in range(3)]
    run(norm, batches[0])
    before = copy.deepcopy(norm.state_dict())
    for bad in (torch.ones(1, 6, 1, 1), torch.ones(4, 5, 3, 3), torch.ones(4, 6, 3, 3).int()):
        with pytest.raises((ValueError, TypeError)):
            run(norm, bad)
    run(norm, torch.ones(0, 6, 3, 3))  # not refused, but nothing to average either
    for name, t in norm.state_dict().items():
        assert torch.equal(t, before[name]), name
    for x in batches[1:]:
        run(norm, x)
    assert norm.num_batches_tracked == 3
    theirs = nn.BatchNorm2d(6, momentum=momentum)
    for x in batches:
        theirs(x)
    close(norm.running_mean, theirs.running_mean, 1e-5)
    close(norm.running_var, theirs.running_var, 1e-5)


def test_the_average_passes_over_a_bad_batch_and_takes_half_precision():
    norm = gannorm.BatchNorm2d(2, momentum=None).half()
    x = torch.randn(4, 2, 3, 3).half()
    norm(x)
    before = norm.running_mean.clone()
    x[0, 1] = torch.nan
    norm(x)
    assert norm.running_mean.isfinite().all() and norm.running_mean[1] == before[1]
    assert norm.running_mean.dtype == torch.float16


def test_statistics_switched_off_after_construction():
    """As torch's: the batch's own in training, the buffers in evaluation, and no update."""
    torch.manual_seed(0)
    ours, theirs = gannorm.BatchNorm2d(6), nn.BatchNorm2d(6)
    for norm in (ours, theirs):
        norm.running_mean.fill_(3.0)
        norm.track_running_stats = False
    x = torch.randn(4, 6, 3, 3)
    close(ours(x), theirs(x), 1e-5)
    close(ours.eval()(x), theirs.eval()(x), 1e-5)
    for name, t in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], t), name


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda norm: pickle.loads(pickle.dumps(norm)),
    "torch.save": lambda norm: torch.load(saved(norm), weights_only=False),
}


def saved(thing: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, how):
    torch.manual_seed(0)
    norm = KINDS[kind](activation="leaky_relu", negative_slope=0.3, weight_init=(1.0, 0.5))
    x = torch.randn(4, 6, 3, 3)
    run(norm, x)
    twin = COPIES[how](norm)
    assert repr(twin) == repr(norm) and twin.weight is not norm.weight
    assert torch.equal(run(twin, x), run(norm, x))
    assert torch.equal(run(twin.eval(), x), run(norm.eval(), x))
    twin.load_state_dict(torch.load(saved(norm.state_dict())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_another_dtype(kind, dtype):
    """model.half() and its like: the same input in its own dtype and in float32."""
    torch.manual_seed(0)
    norm = KINDS[kind](weight_init=(1.0, 0.5))
    expected = run(copy.deepcopy(norm), x := torch.randn(4, 6, 3, 3))
    tolerance = 1e-5 if dtype == torch.float64 else 2e-2
    for moved in (x.to(dtype), x):
        cast = copy.deepcopy(norm).to(dtype)
        y = run(cast, moved)
        assert y.dtype == moved.dtype
        close(y.float(), expected, tolerance)
        y.float().sum().backward()
        assert cast.weight.grad.dtype == dtype
        close(run(cast.eval(), moved).float(), run(cast, x).float(), tolerance)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [*KINDS, *AVERAGES])
def test_compiled_in_one_graph(kind):
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = (KINDS | AVERAGES)[kind]()
    compiled = copy.deepcopy(eager)
    step = torch.compile(lambda x: run(compiled, x), fullgraph=True, backend="aot_eager")
    for n, training in ((4, True), (3, True), (4, False)):
        compiled.train(training), eager.train(training)
        x = torch.randn(n, 6, 3, 3)
        close(step(x), run(eager, x), 1e-5)
    for name, t in eager.state_dict().items():
        close(compiled.state_dict()[name], t, 1e-6)


def test_compiled_unbatched_and_2d():
    torch._dynamo.reset()
    for norm, shape in ((gannorm.InstanceNorm2d(6), (6, 4, 4)), (gannorm.GroupNorm(2, 6), (4, 6))):
        x = torch.randn(shape)
        step = torch.compile(norm, fullgraph=True, backend="aot_eager")
        close(step(x), norm(x), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_parametrizations(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, 3)
    norm = KINDS[kind]()
    rows = norm.weight.view(norm.weight.shape[0], -1)
    expected = run(KINDS[kind](), x)
    weighted = parametrizations.weight_norm(norm)
    y = run(weighted, x)
    close(y, expected, 1e-5)  # the start: the same weight in two parts
    y.square().sum().backward()
    assert weighted.parametrizations.weight.original0.grad is not None
    spectral = parametrizations.spectral_norm(KINDS[kind]())
    sigma = torch.linalg.matrix_norm(rows, 2) if kind.startswith("cond") else rows.norm()
    close(run(spectral.eval(), x), run(KINDS[kind]().eval(), x) / sigma, 1e-3)
