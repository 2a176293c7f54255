"""What torch and its users do to a norm once it stands in a model: each tool works, with the values
that torch's own norm gives, or refuses with a sentence. docs/norms.md has the table.
"""

import copy
import pickle
import warnings

import pytest
import torch
from parity import close
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import swa_utils
from torch.utils import checkpoint

import gannorm
from gannorm import convert
from gannorm import functional as F

LEAKY = {"activation": "leaky_relu", "negative_slope": 0.3}
CLASSES = 3
NORMS = {
    "instance": lambda **kw: gannorm.InstanceNorm2d(4, affine=True, **kw),
    "instance, tracking": lambda **kw: gannorm.InstanceNorm2d(4, track_running_stats=True, **kw),
    "batch": lambda **kw: gannorm.BatchNorm2d(4, **kw),
    "group": lambda **kw: gannorm.GroupNorm(2, 4, **kw),
    "layer": lambda **kw: gannorm.LayerNorm2d(4, **kw),
    "conditional batch": lambda **kw: gannorm.ConditionalBatchNorm2d(4, CLASSES, **kw),
    "conditional instance": lambda **kw: gannorm.ConditionalInstanceNorm2d(4, CLASSES, **kw),
}
X = torch.linspace(-3, 5, 3 * 4 * 5 * 6).sin().view(3, 4, 5, 6).double() * 2 + 1
LABELS = torch.tensor([2, 0, 2])


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


class ByClass(Net):
    def forward(self, x, labels):
        return self.last(self.norm(self.conv(x), labels))


def make(kind: str, **kwargs) -> tuple[Net, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    by_class = "conditional" in kind
    net = (ByClass if by_class else Net)(NORMS[kind](**kwargs)).double()
    for p in net.norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return net, (X, LABELS) if by_class else (X,)


def same(a: nn.Module, b: nn.Module, inputs, tolerance: float = 1e-9) -> None:
    """Output, gradients and what the norms remember."""
    outputs = [m(*inputs) for m in (a, b)]
    close(*outputs, tolerance)
    for y in outputs:
        y.square().sum().backward()
    theirs = dict(b.named_parameters())
    for name, p in a.named_parameters():
        if (expected := theirs.pop(name)).requires_grad:
            close(p.grad, expected.grad, tolerance * 100)
    assert not theirs
    theirs = dict(b.named_buffers())
    for name, p in a.named_buffers():  # an exported module has those that it uses
        close(p.double(), theirs[name].double(), tolerance)


every = pytest.mark.parametrize("kind", NORMS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@every
@modes
def test_symbolic_trace(kind, training):
    """A norm is a leaf, as torch's are; its checks look at what flows through the traced module."""
    net, inputs = make(kind, **LEAKY)
    net.train(training)
    traced = symbolic_trace(copy.deepcopy(net))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == [
        "conv", "norm", "last",
    ]  # fmt: skip
    again = pickle.loads(pickle.dumps(traced))
    same(again, net, inputs)
    assert type(traced.norm) is type(net.norm)
    if len(inputs) > 1:
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
            again(X, LABELS + 1)


def test_symbolic_trace_keeps_residuals_and_functions():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = gannorm.GroupNorm(2, 4, activation="silu").double()

        def forward(self, x):
            y = F.batch_norm(self.norm(x, residual=x), None, None, training=True)
            y = F.layer_norm(y, (6,))
            mean, var = F.moments(y, (0, 2, 3), True)
            return F.batch_normalization(y, mean, var, None, None, 1e-3) + x

    block = Block()
    traced = symbolic_trace(block)
    close(traced(X), block(X), 1e-12)
    with pytest.raises(ValueError, match="normalized_shape"):
        traced(X[..., :5])


def test_features_of_a_converted_model():
    models = pytest.importorskip("torchvision.models")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    plain = models.resnet18().eval()
    names = ["layer1", "layer2.0.bn1", "layer4.1.relu"]
    x = torch.randn(2, 3, 32, 32)
    expected = create_feature_extractor(plain, names)(x)
    found = create_feature_extractor(convert(copy.deepcopy(plain)), names)(x)
    for name in names:
        close(found[name], expected[name], 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_fx_quantization(kind):
    """Convolutions become int8 ones; the norm between them stays float, with its activation."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    net, _ = make(kind, activation="relu")
    net, x = net.float().eval(), X.float()
    prepared = quantize_fx.prepare_fx(net, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)
    assert "quantized" in type(quantized.conv).__module__ and type(quantized.norm) is type(net.norm)
    scale = net(x).abs().max()
    assert (quantized(x) - net(x)).abs().mean() < 0.1 * scale


@every
@modes
def test_make_fx(kind, training):
    """The graph holds torch's operators, and a derivative is one more graph."""
    net, inputs = make(kind, **LEAKY)
    net.train(training)
    twin = copy.deepcopy(net)

    def run(x):
        return net(x, *inputs[1:])

    def penalty(x):
        (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    graph = make_fx(run)(X)
    names = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert not any("gannorm" in name or "out" in name.split(".")[1:] for name in names)
    assert any("_norm" in name for name in names), "a norm of torch's"
    close(graph(X), twin(*inputs), 1e-9)
    x = X.clone().requires_grad_()
    close(make_fx(penalty)(x)(x), penalty(x), 1e-6)


@every
def test_flop_counters_and_fake_tensors(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    net, inputs = make(kind, **LEAKY)
    expected = net(*inputs)
    with FlopCounterMode(display=False) as counter:
        y = net(*inputs)
    close(y, expected, 1e-9)
    assert counter.get_total_flops() == 2 * 90 * (4 * 4 + 4 * 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = net(mode.from_tensor(X), *inputs[1:])
    assert y.shape == expected.shape and type(y).__name__ == "FakeTensor"
    copies = copy.deepcopy(net).to("meta")
    assert copies(*(t.to("meta") for t in inputs)).is_meta


ONE = torch.ones(4).double()
NOT_TORCHS = {
    "one statistic": lambda: F.batch_norm(X, None, ONE.clone(), training=True),
    "one of an instance norm's": lambda: F.instance_norm(X, ONE.clone()),
    "no pixels": lambda: F.group_norm(X[..., :0], 2),
    "no channels": lambda: F.group_norm(X[:, :0], 1),
    "no samples": lambda: F.instance_norm(X[:0]),
    "parameters of another dtype": lambda: F.instance_norm(X, weight=ONE.float()),
}


@pytest.mark.parametrize("what", NOT_TORCHS)
def test_what_torchs_operator_takes_not(what):
    """It is our composition then, watched or not."""
    from torch.utils.flop_counter import FlopCounterMode

    expected = NOT_TORCHS[what]()
    with FlopCounterMode(display=False):
        close(NOT_TORCHS[what](), expected, 1e-9)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
@pytest.mark.parametrize("kind", [k for k in NORMS if "batch" in k or "tracking" in k])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_activation_checkpointing_counts_a_batch_once(kind, reentrant, momentum):
    """torch's own norms move their statistics twice: "recomputed" among the differences."""
    net, inputs = make(kind, **LEAKY)
    net.norm.momentum = momentum
    twin = copy.deepcopy(net)
    for step in range(3):
        x = (inputs[0] + step).requires_grad_()
        y = checkpoint.checkpoint(net, x, *inputs[1:], use_reentrant=reentrant)
        y.square().sum().backward()
        twin(x, *inputs[1:]).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, 1e-9)
    for (name, p), q in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)
    assert net.norm.num_batches_tracked in (3, 0)  # instance norms do not count


@every
def test_selective_checkpointing(kind):
    net, inputs = make(kind, **LEAKY)
    twin = copy.deepcopy(net)

    def policy(ctx, op, *args, **kwargs):
        keep = checkpoint.CheckpointPolicy
        return keep.MUST_SAVE if "convolution" in str(op) else keep.PREFER_RECOMPUTE

    def contexts():
        return checkpoint.create_selective_checkpoint_contexts(policy)

    net.eval(), twin.eval()  # in training torch refuses what is moved in place
    y = checkpoint.checkpoint(net, *inputs, use_reentrant=False, context_fn=contexts)
    y.square().sum().backward()
    twin(*inputs).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, 1e-9)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["batch", "conditional batch"])
def test_update_bn(kind, momentum):
    """Statistics anew, over all batches."""

    class Pairs(nn.Module):  # update_bn hands on one input
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, pair):
            return self.net(*pair)

    net, inputs = make(kind, **LEAKY)
    net.norm.momentum = momentum
    net.norm.running_mean.fill_(7)
    batches = [[(inputs[0] * scale, *inputs[1:])] for scale in (1.0, 2.0)]
    swa_utils.update_bn(batches, Pairs(net))
    h = [net.conv(inputs[0] * scale) for scale in (1.0, 2.0)]
    close(net.norm.running_mean, sum(t.mean((0, 2, 3)) for t in h) / 2, 1e-9)
    close(net.norm.running_var, sum(t.transpose(0, 1).flatten(1).var(1) for t in h) / 2, 1e-9)
    assert net.norm.num_batches_tracked == 2 and net.norm.momentum == momentum
    averaged = swa_utils.AveragedModel(net, use_buffers=True)
    averaged.update_parameters(net)
    close(averaged.eval()(*inputs), net.eval()(*inputs), 1e-9)


@pytest.mark.parametrize("kind", ["batch", "conditional batch"])
def test_freezing_by_the_class(kind):
    net, inputs = make(kind, **LEAKY)
    for m in net.train().modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval().requires_grad_(False)
    before = copy.deepcopy(net.norm.state_dict())
    net(*inputs).sum().backward()
    assert net.norm.weight.grad is None and net.conv.weight.grad is not None
    for name, value in net.norm.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_what_makes_a_batch_norm_anew():
    """Right where torch's batch norm is the same; else it says what would be lost."""
    net, inputs = make("batch")
    for _ in range(3):
        net(*inputs)
    expected = net.eval()(X)
    fused = nn.utils.fusion.fuse_conv_bn_eval(net.conv, net.norm)
    close(net.last(fused(X)), expected, 1e-9)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval()
    assert type(synced.norm) is nn.SyncBatchNorm
    close(synced(X), expected, 1e-9)


def test_folding_into_a_linear_layer():
    norm, linear = gannorm.BatchNorm1d(4), nn.Linear(3, 4)
    x = torch.randn(5, 3)
    norm(linear(x))
    expected = norm.eval()(linear.eval()(x))
    close(nn.utils.fusion.fuse_linear_bn_eval(linear, norm)(x), expected, 1e-5)
    with pytest.raises(RuntimeError, match="lose the activation 'relu'"):
        nn.utils.fusion.fuse_linear_bn_eval(
            linear, gannorm.BatchNorm1d(4, activation="relu").eval()
        )


LOST = [
    ("batch", {"activation": "relu"}, "the activation 'relu'"),
    ("batch", {"var_estimator": "biased"}, "the biased running variance"),
    ("conditional batch", {}, "the table of its classes"),
]


@pytest.mark.parametrize("kind,kwargs,what", LOST, ids=lambda v: str(v))
def test_what_would_lose_something_is_refused(kind, kwargs, what):
    net, _ = make(kind, **kwargs)
    with pytest.raises(RuntimeError, match=f"anew as .* lose {what}"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.eval()
    if "var_estimator" not in kwargs:
        with pytest.raises(RuntimeError, match=f"anew as .* lose {what}"):
            nn.utils.fusion.fuse_conv_bn_eval(net.conv, net.norm)
    else:
        assert nn.utils.fusion.fuse_conv_bn_eval(net.conv, net.norm)
    assert net.norm.eps == 1e-5
    copy.deepcopy(net), pickle.loads(pickle.dumps(net)), repr(net)
    net.norm.eps = 1e-3
    assert net.norm.eps == 1e-3


@every
def test_jit(kind):
    net, inputs = make(kind, **LEAKY)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile .*torch\.export"):
        torch.jit.script(net)
    net.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(net, inputs)
    of_sizes = [w for w in caught if w.category is torch.jit.TracerWarning]
    assert len({(w.filename, w.lineno) for w in of_sizes}) <= 2  # as of torch's instance norm
    bigger = (torch.cat([X, X], 2), *inputs[1:])
    close(traced(*bigger), net(*bigger), 1e-9)


@every
def test_mkldnn(kind):
    """A batch norm becomes oneDNN's; the others name the layout that they do not take."""
    from torch.utils import mkldnn

    net, inputs = make(kind)
    net, inputs = net.float().eval(), (X.float(), *inputs[1:])
    expected = net(*inputs)
    opaque = mkldnn.to_mkldnn(net)
    opaque_inputs = (inputs[0].to_mkldnn(), *inputs[1:])
    if kind == "batch":
        close(opaque(*opaque_inputs).to_dense(), expected, 1e-5)
        fused = make(kind, **LEAKY)[0].float().eval()
        with pytest.raises(RuntimeError, match="lose the activation 'leaky_relu'"):
            mkldnn.to_mkldnn(fused)
    else:
        with pytest.raises(ValueError, match=r"torch\._mkldnn; call \.to_dense\(\)"):
            opaque(*opaque_inputs)


def test_sparse_inputs_are_refused():
    with pytest.raises(ValueError, match=r"input has the layout torch\.sparse_coo; call \.to_d"):
        F.batch_norm(X.to_sparse(), None, None, training=True)


def test_tensor_subclasses_go_in_and_come_out():
    class Mine(torch.Tensor):
        pass

    x = X.as_subclass(Mine)
    for kind in NORMS:
        net, inputs = make(kind, **LEAKY)
        y = net.norm(x, *inputs[1:])
        assert type(y) is Mine
        close(y.as_subclass(torch.Tensor), net.norm(*inputs), 1e-9)


def test_residual_by_position():
    for kind in NORMS:
        net, inputs = make(kind, **LEAKY)
        a, b = net.norm(*inputs, X + 1), net.norm(*inputs, residual=X + 1)
        close(a, b, 0)


def versions(state: dict) -> None:
    for metadata in state._metadata.values():
        metadata.pop("version", None)


@pytest.mark.parametrize("kind", ["batch", "conditional batch"])
def test_weights_older_than_the_count_of_batches(kind):
    """torch 0.3's files have no num_batches_tracked, and no versions."""
    net, _ = make(kind)
    net.norm.num_batches_tracked.fill_(5)
    state = net.state_dict()
    versions(state)
    del state["norm.num_batches_tracked"]
    other, _ = make(kind)
    other.norm.num_batches_tracked.fill_(9)
    other.load_state_dict(state)
    assert other.norm.num_batches_tracked == 9
    with pytest.raises(RuntimeError, match="norm.running_mean"):
        del state["norm.running_mean"]
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", ["instance", "conditional instance"])
def test_instance_norms_drop_the_statistics_of_old_files(kind):
    """torch below 0.4 wrote them always; the reference CycleGAN drops them when it loads."""
    net, _ = make(kind)
    old = net.state_dict()
    versions(old)
    extra = {f"norm.{name}": torch.ones(4) for name in ("running_mean", "running_var")}
    extra["norm.num_batches_tracked"] = torch.tensor(3)
    other, _ = make(kind)
    nn.init.zeros_(other.norm.weight)
    for state in (old | extra, dict(net.state_dict()) | extra):  # a plain dict has no versions
        other.load_state_dict(state)
        close(other.norm.weight, net.norm.weight, 0)
    tracking = NORMS["instance, tracking"]()
    tracking.load_state_dict({name.removeprefix("norm."): t for name, t in extra.items()})
    assert tracking.running_mean.sum() == 4 and tracking.num_batches_tracked == 3
    with pytest.raises(RuntimeError, match="running_mean"):  # a file of today means what it says
        gannorm.InstanceNorm2d(4).load_state_dict(tracking.state_dict())
