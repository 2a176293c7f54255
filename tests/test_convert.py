"""convert: torchvision's resnet18 and a U-Net with instance norms, before and after."""

import copy
import pickle
from importlib import import_module

import pytest
import torch
from parity import close
from torch import nn
from torch.nn.utils import parametrizations, prune

import gannorm
from gannorm import convert

convert_module = import_module("gannorm.norms.convert")


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.InstanceNorm2d(b, affine=True), nn.LeakyReLU(0.1),
                nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(2, b), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.down, self.mid, self.up = block(3, 8), block(8, 8), block(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(x)
        low = nn.functional.interpolate(self.mid(nn.functional.avg_pool2d(h, 2)), scale_factor=2)
        return self.up(torch.cat([h, low], 1))


def check(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    """Output, gradients and state_dict before and after, in training and in evaluation."""
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    ours = convert(model)
    assert ours is model and dict(ours.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    for training in (True, False):
        ours.train(training), before.train(training)
        a, b = ours(*inputs), before(*inputs)
        close(a, b, 1e-9)
        a.square().mean().backward()
        b.square().mean().backward()
        for p, q in zip(ours.parameters(), before.parameters(), strict=True):
            close(p.grad, q.grad, 1e-8)
    assert ours.state_dict().keys() == before.state_dict().keys()
    for name, value in before.state_dict().items():
        close(ours.state_dict()[name].double(), value.double(), 1e-9)
    before.load_state_dict(ours.state_dict())
    ours.load_state_dict(before.state_dict())
    return ours


@pytest.fixture
def fused(monkeypatch):
    """The activations that ran inside of a norm."""
    seen, joint = [], convert_module._joint

    def look(norm: nn.Module, behind: nn.Module):
        epilogue = joint(norm, behind)
        if epilogue is not None:
            seen.append(epilogue)
        return epilogue

    monkeypatch.setattr(convert_module, "_joint", look)
    return seen


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules()]


@pytest.mark.parametrize("name,norms,joined", [("resnet18", 20, 16), ("resnet50", 53, 48)])
def test_resnets(name, norms, joined, fused):
    """Their blocks run norm, addition and ReLU in one; hooks, pickles and slices go on working."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=5).double()
    x = torch.randn(2, 3, 40, 40).double()
    ours = check(model, x)
    assert sum(type(m) is gannorm.BatchNorm2d for m in ours.modules()) == norms
    assert len(fused) == 2 * joined
    expected = ours.eval()(x)
    close(pickle.loads(pickle.dumps(ours))(x), expected, 0)
    seen = []
    ours.layer1[0].bn1.register_forward_hook(lambda m, x, y: seen.append(y.min()))
    close(ours(x), expected, 1e-12)
    assert seen[0] < 0  # the norm's own output, before the ReLU


def test_unet(fused):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16).double()
    modules = kinds(UNet())
    ours = check(UNet().double(), x)
    assert kinds(ours) == modules
    assert [(e.activation, e.negative_slope) for e in fused[:2]] == [
        ("leaky_relu", 0.1), ("relu", 0.2),
    ]  # fmt: skip
    assert len(fused) == 2 * 6 and ours.down[1].epilogue.activation is None


def test_a_norm_itself_keeps_its_settings():
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False).eval()
    ours = convert(norm)
    assert type(ours) is gannorm.BatchNorm2d and not ours.training
    assert (ours.eps, ours.momentum, ours.affine) == (1e-3, None, False)
    assert ours.running_mean is norm.running_mean
    instance = convert(nn.InstanceNorm2d(4, track_running_stats=True, momentum=0.3))
    assert instance.track_running_stats and instance.momentum == 0.3
    assert convert(nn.GroupNorm(2, 4, eps=0.1)).eps == 0.1


def test_converting_twice_and_what_is_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(), nn.SyncBatchNorm(4), nn.ReLU())
    once = kinds(convert(model))
    assert once == ["Sequential", "BatchNorm2d", "ReLU", "ReLU", "SyncBatchNorm", "ReLU"]
    kind = type(model)
    assert (
        kinds(convert(model)) == once and type(model) is kind and isinstance(model, nn.Sequential)
    )


def test_modules_in_several_places(fused):
    """A norm or an activation that stands in two places does in each what it did."""
    x = torch.randn(2, 4, 3, 3).double()
    relu, norm = nn.ReLU(), nn.GroupNorm(2, 4)
    model = nn.Sequential(relu, norm, relu, norm, nn.Conv2d(4, 4, 1), relu).double()
    expected = model(x)
    close(convert(model)(x), expected, 1e-10)
    assert model[1] is model[3] and type(model[1]) is gannorm.GroupNorm and len(fused) == 1


def test_what_stands_between(fused):
    """A dropout that drops nothing, as monai's blocks have, and an Identity do not part the two."""
    model = net(nn.Dropout(0.5), nn.Identity(), nn.LeakyReLU(0.3))
    expected = model.eval()(X)
    close(convert(model)(X), expected, 1e-5)
    assert len(fused) == 1
    torch.manual_seed(1)
    dropped = model.train()(X)
    assert len(fused) == 1 and (dropped == 0).sum() > 20
    model[2].p = 0.0
    model(X)
    assert len(fused) == 2


def net(*behind: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *behind)
    nn.init.normal_(model[1].weight)
    return model


X = torch.linspace(-2, 2, 3 * 3 * 4 * 5).sin().view(3, 3, 4, 5)


def test_the_norm_stays_the_same_object():
    """With mode, flags, dtype and whatever else hangs on it."""
    norm = nn.BatchNorm2d(4, dtype=torch.float64).eval()
    norm.weight.requires_grad_(False)
    norm.register_buffer("extra", torch.ones(2), persistent=False)
    norm.remark = "mine"
    tensors = dict(norm.named_parameters()) | dict(norm.named_buffers())
    assert convert(norm) is norm and type(norm) is gannorm.BatchNorm2d
    now = dict(norm.named_parameters()) | dict(norm.named_buffers())
    assert now.keys() == tensors.keys() and all(t is tensors[name] for name, t in now.items())
    assert not norm.weight.requires_grad and norm.bias.requires_grad
    assert not norm.training and norm.weight.dtype == torch.float64 and norm.remark == "mine"
    x = torch.randn(2, 4, 3, 3).double()
    close(norm(x), nn.BatchNorm2d(4).double().eval()(x), 1e-10)
    meta = convert(nn.GroupNorm(2, 4, device="meta"))
    assert meta.weight.is_meta and meta(torch.ones(2, 4, 3, device="meta")).is_meta
    assert repr(convert(nn.GroupNorm(2, 4))) == repr(gannorm.GroupNorm(2, 4))


def test_a_fused_norm_keeps_mode_and_flags():
    model = net(nn.ReLU()).eval()
    model[1].bias.requires_grad_(False)
    expected, parameters = model(X), list(model.parameters())
    convert(model)
    assert not model[1].training and not model[1].bias.requires_grad
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    close(model(X), expected, 1e-6)
    model.double()
    assert model[1].running_mean.dtype == model[1].weight.dtype == torch.float64
    close(model(X.double()).float(), expected, 1e-6)
    again = copy.deepcopy(model)
    again.train()(X.double()), model.train()(X.double())
    assert model[1].num_batches_tracked == again[1].num_batches_tracked == 1
    assert type(again) is type(model) and repr(again) == repr(model)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, x, y: seen.append(y)),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda m, x: seen.append(x[0])),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0])),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda m, dy: seen.append(dy[0])
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", [1, 2], ids=["on the norm", "on the activation"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_what_they_saw(hook, where, when, fused):
    """Whether they came before the conversion or after it."""
    model, seen = net(nn.LeakyReLU(0.1)), []
    handle = HOOKS[hook](model[where], seen)
    model(X).square().sum().backward()
    if when == "after":
        handle.remove()
    convert(model)
    if when == "after":
        handle = HOOKS[hook](model[where], seen)
    model(X).square().sum().backward()
    assert type(model[1]) is gannorm.BatchNorm2d and len(seen) == 2 and not fused
    close(seen[1], seen[0], 1e-4)
    handle.remove()
    model(X)
    assert len(fused) == 1 and len(seen) == 2


def test_a_hook_on_every_module(fused):
    model, seen = convert(net(nn.Identity(), nn.ReLU())), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(type(m)))
    try:
        model(X)
    finally:
        handle.remove()
    assert seen[:4] == [nn.Conv2d, gannorm.BatchNorm2d, nn.Identity, nn.ReLU] and not fused


def test_a_traced_graph_holds_every_module():
    """A dropout that drops nothing now may drop something later."""
    traced = torch.fx.symbolic_trace(convert(net(nn.Dropout(0.0), nn.ReLU())))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3"]


def test_a_hook_that_knows_its_module():
    """register_load_state_dict_pre_hook holds the norm weakly: it has to live on."""
    seen = []
    model = net(nn.ReLU())
    model[1].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    convert(model).load_state_dict(model.state_dict())
    assert seen == [model[1]]


def test_weights_made_by_hooks_and_parametrizations():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.GroupNorm(3, 3)), nn.ReLU())
    prune.random_unstructured(norm := nn.BatchNorm2d(3), "weight", 2)
    model += nn.Sequential(norm, nn.ReLU())
    keys, expected = list(model.state_dict()), model(X)
    convert(model)
    assert list(model.state_dict()) == keys and type(model[2]) is gannorm.BatchNorm2d
    close(model(X), expected, 1e-5)
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    assert not torch.allclose(model(X), expected)
    # A parametrized module has a class of its own, and stays.
    model = nn.Sequential(parametrizations.weight_norm(nn.GroupNorm(3, 3)), nn.ReLU())
    before = list(model)
    assert [*convert(model)] == before and isinstance(model[0], nn.GroupNorm)
    assert not isinstance(model[0], gannorm.GroupNorm)


def test_a_replaced_forward_stays(caplog, fused):
    model = net(nn.ReLU())
    model[1].forward = lambda x: -x
    expected = model(X)
    assert type(convert(model)[1]) is nn.BatchNorm2d
    assert "leaves 1 as it is (its forward was replaced)" in caplog.text
    close(model(X), expected, 0)
    model = convert(net(nn.ReLU()))
    model[2].forward = lambda x: x + 1
    assert model(X).min() < 0 and not fused


Mine = type("Mine", (nn.BatchNorm2d,), {"__module__": "theirs"})
OTHERS = {
    nn.SyncBatchNorm(3): "SyncBatchNorm: its statistics are those of several processes",
    nn.LayerNorm(3): "LayerNorm: there is none of ours",
    nn.RMSNorm(3): "RMSNorm: there is none of ours",
    nn.LocalResponseNorm(2): "LocalResponseNorm: there is none of ours",
    nn.LazyBatchNorm2d(): "LazyBatchNorm2d: convert it once it has seen an input",
    Mine(3): "theirs.Mine: a class of its own",
}


@pytest.mark.parametrize("norm", OTHERS, ids=lambda norm: type(norm).__name__)
def test_other_norms_are_left_alone_and_named(norm, caplog):
    model = nn.Sequential(norm, relu := nn.ReLU(), nn.Sequential(norm))
    kind = type(norm)
    assert [*convert(model)][:2] == [norm, relu] and type(norm) is kind
    assert f"convert leaves 0 as it is ({OTHERS[norm]})" in caplog.text
    convert(norm)
    assert f"convert leaves {kind.__name__} as it is" in caplog.text


SHAPES = {"1d": (3, 4, 6), "2d": (3, 4, 5, 6), "3d": (3, 4, 2, 5, 6)}
AFFINE = {"affine": True, "track_running_stats": True}


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_every_number_of_dimensions(norm, dims, fused):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[dims]).double()
    layer = getattr(nn, norm + dims)(4, eps=1e-3, momentum=0.3, **AFFINE)
    nn.init.normal_(layer.weight)
    model = check(nn.Sequential(layer, nn.SiLU()).double(), x)
    assert type(model[0]) is getattr(gannorm, norm + dims) and len(fused) == 2
    ours = getattr(gannorm, norm + dims)(4, eps=1e-3, momentum=0.3, **AFFINE)
    assert repr(ours) == repr(model[0]) and ours.state_dict().keys() == layer.state_dict().keys()
    theirs = nn.Sequential(copy.deepcopy(layer).double(), nn.SiLU()).eval()
    theirs.load_state_dict(model.state_dict())
    single = x[0] if norm == "InstanceNorm" else x.flatten(2)[..., 0]  # (C, ...), or (N, C)
    if norm == "InstanceNorm" or dims == "1d":
        close(model.eval()(single), theirs(single), 1e-9)
    else:
        with pytest.raises(ValueError, match="takes"):
            model[0](x[0])


def test_a_lazy_norm_is_converted_once_it_has_its_size():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    expected = model(X)
    assert type(convert(model)[0]) is gannorm.BatchNorm2d
    close(model(X), expected, 1e-5)


class Slope(nn.LeakyReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


ACTIVATIONS = [
    (nn.ReLU(inplace=True), True), (nn.LeakyReLU(0.1, inplace=True), True), (nn.SiLU(), True),
    (nn.LeakyReLU(0.0), True), (nn.ReLU6(), False), (nn.ELU(), False), (nn.PReLU(), False),
    (nn.Tanh(), False), (Slope(0.1), False), (nn.Dropout(0.0), False),
]  # fmt: skip


@pytest.mark.parametrize("activation,folded", ACTIVATIONS, ids=lambda a: str(a))
def test_which_activations_are_folded(activation, folded, fused):
    model = net(activation, nn.Conv2d(4, 2, 1))
    before = copy.deepcopy(model)
    convert(model)
    close(model(X), before(X), 1e-5)
    assert len(fused) == folded
    for m in (model, before):
        m(X).square().sum().backward()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)


def test_slices_indices_and_loops_read_what_they_read():
    model = net(nn.LeakyReLU(0.5), nn.Conv2d(4, 4, 1))

    def parts(model: nn.Sequential) -> list[torch.Tensor]:
        h, found = X, [model[:2](X), model[:3](X), model(X)]
        for layer in model:
            found.append(h := layer(h))
        return found

    expected = parts(model)
    for a, e in zip(parts(convert(model)), expected, strict=True):
        close(a, e, 1e-5)


def test_a_converted_model_compiles_in_one_graph():
    plain = net(nn.Dropout(0.0), nn.LeakyReLU(0.5), nn.Conv2d(4, 4, 1))
    model = convert(copy.deepcopy(plain))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for m in (compiled, plain):
        m(X).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)
    close(model[1].running_var, plain[1].running_var, 1e-5)
    assert model[1].num_batches_tracked == 1


def test_a_sequential_of_ones_own(fused):
    """A subclass without a forward of its own fuses; one with it, and a replaced one, do not."""

    class Block(nn.Sequential):
        def __init__(self, channels: int) -> None:
            super().__init__(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())

    class Backwards(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(-x)

    plain, backwards, replaced = Block(4), Backwards(4), Block(4)
    replaced.forward = lambda x: x
    for model, joined in ((plain, 1), (backwards, 0), (replaced, 0)):
        expected = model(X)
        assert isinstance(convert(model), Block)
        close(model(X), expected, 1e-5)
        assert len(fused) == joined
        fused.clear()
    assert repr(plain).startswith("Block(")


def test_another_module_in_a_norms_place():
    """What torch does to a norm after its conversion leaves the activation where it is."""
    model = convert(net(nn.ReLU())).eval()
    expected = model(X)
    model[0], model[1] = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    close(model(X), expected, 1e-5)
    assert model(X).min() == 0
    model = convert(net(nn.ReLU())).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(synced[1]) is nn.SyncBatchNorm
    close(synced(X), expected, 1e-5)


def test_an_optimizer_made_before_goes_on():
    model, plain = net(nn.ReLU()), net(nn.ReLU())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain)]
    convert(model)
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        m(X).square().sum().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p, q, 1e-5)
