"""convert: torchvision's resnet18 and a U-Net with instance norms, before and after."""

import copy

import pytest
import torch
from parity import close
from torch import nn
from torch.nn.utils import parametrizations, prune

import gannorm
from gannorm import convert


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


def check(model: nn.Module, x: torch.Tensor, fuse: bool) -> nn.Module:
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    ours = convert(model, fuse=fuse)
    assert ours is model and dict(ours.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    for training in (True, False):
        ours.train(training), before.train(training)
        a, b = ours(x), before(x)
        close(a, b, 1e-9)
        a.square().mean().backward()
        b.square().mean().backward()
        for p, q in zip(ours.parameters(), before.parameters(), strict=True):
            close(p.grad, q.grad, 1e-8)
    for name, value in before.state_dict().items():
        close(ours.state_dict()[name].double(), value.double(), 1e-9)
    before.load_state_dict(ours.state_dict())
    ours.load_state_dict(before.state_dict())
    return ours


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules()]


def test_resnet18():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18(num_classes=5).double()
    norms = kinds(model).count("BatchNorm2d")
    ours = check(model, torch.randn(2, 3, 64, 64).double(), fuse=True)
    assert sum(type(m) is gannorm.BatchNorm2d for m in ours.modules()) == norms == 20


def test_unet_fused_and_not():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16).double()
    fused = check(UNet().double(), x, fuse=True)
    assert kinds(fused).count("ReLU") == 0 and kinds(fused).count("LeakyReLU") == 0
    assert kinds(fused).count("Identity") == 6
    assert fused.down[1].epilogue.negative_slope == 0.1
    plain = check(UNet().double(), x, fuse=False)
    assert kinds(plain).count("ReLU") == 3 and kinds(plain).count("Identity") == 0


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
    assert once == ["Sequential", "BatchNorm2d", "Identity", "ReLU", "SyncBatchNorm", "ReLU"]
    assert kinds(convert(model)) == once


def test_a_shared_activation_stays_where_it_is_used_alone():
    relu = nn.ReLU()
    model = nn.Sequential(nn.GroupNorm(2, 4), relu, nn.Conv2d(4, 4, 1), relu).double()
    x = torch.randn(2, 4, 3, 3).double()
    expected = model(x)
    assert kinds(convert(model)) == ["Sequential", "GroupNorm", "Identity", "Conv2d", "ReLU"]
    close(model(x), expected, 1e-10)


def test_modules_in_several_places():
    """A ReLU before a norm stays; a norm used twice stays one norm and takes no ReLU in."""
    x = torch.randn(2, 4, 3, 3).double()
    relu, norm = nn.ReLU(), nn.GroupNorm(2, 4)
    model = nn.Sequential(relu, norm, relu, norm).double()
    expected = model(x)
    assert kinds(convert(model)) == ["Sequential", "ReLU", "GroupNorm"]
    assert model[1] is model[3] and type(model[1]) is gannorm.GroupNorm
    close(model(x), expected, 1e-10)
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.GroupNorm(2, 4), relu).double()
    expected = model(x)
    close(convert(model)(x), expected, 1e-10)
    assert [type(m).__name__ for m in model] == ["ReLU", "GroupNorm", "Identity"]
    ours = gannorm.GroupNorm(2, 4).double()
    model = nn.Sequential(ours, nn.ReLU(), ours)
    expected = model(x)
    close(convert(model)(x), expected, 1e-10)


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


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, x, y: seen.append(y)),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda m, x: seen.append(x[0])),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0])),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda m, dy: seen.append(dy[0])
    ),
}


@pytest.mark.parametrize("where", [1, 2], ids=["on the norm", "on the activation"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_what_they_saw(hook, where):
    """They stay, and what stands between a norm and its activation stays where it is."""
    model, seen = net(nn.LeakyReLU(0.1)), []
    handle = HOOKS[hook](model[where], seen)
    model(X).square().sum().backward()
    convert(model)
    model(X).square().sum().backward()
    assert kinds(model) == ["Sequential", "Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert type(model[1]) is gannorm.BatchNorm2d and len(seen) == 2
    close(seen[1], seen[0], 1e-4)
    handle.remove()
    assert kinds(convert(model))[-1] == "Identity"


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


def test_a_replaced_forward_stays():
    model = net(nn.ReLU())
    model[1].forward = lambda x: -x
    expected = model(X)
    assert type(convert(model)[1]) is nn.BatchNorm2d
    close(model(X), expected, 0)


OTHERS = (
    nn.BatchNorm1d(3), nn.BatchNorm3d(3), nn.InstanceNorm1d(3), nn.InstanceNorm3d(3),
    nn.SyncBatchNorm(3), nn.LayerNorm(3), nn.LazyBatchNorm2d(), nn.LocalResponseNorm(2),
    type("Mine", (nn.BatchNorm2d,), {})(3),
)  # fmt: skip


@pytest.mark.parametrize("norm", OTHERS, ids=lambda norm: type(norm).__name__)
def test_other_norms_are_left_alone(norm):
    model = nn.Sequential(norm, relu := nn.ReLU())
    kind = type(norm)
    assert [*convert(model)] == [norm, relu] and type(norm) is kind


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
def test_which_activations_are_folded(activation, folded):
    model = net(activation, nn.Conv2d(4, 2, 1))
    before = copy.deepcopy(model)
    convert(model)
    assert type(model[2]) is (nn.Identity if folded else type(activation))
    close(model(X), before(X), 1e-5)
    for m in (model, before):
        m(X).square().sum().backward()
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)


def test_one_activation_behind_several_norms_and_outside():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.LeakyReLU(0.3)
            self.body = nn.Sequential(nn.GroupNorm(1, 3), self.act, nn.GroupNorm(3, 3), self.act)
            self.norm = nn.InstanceNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.body(x))
            return self.act(h) + h  # the norm's output is used before its activation

    torch.manual_seed(0)
    model = Net()
    expected = model(X)
    convert(model)
    assert kinds(model.body) == ["Sequential", "GroupNorm", "Identity", "GroupNorm", "Identity"]
    assert type(model.act) is nn.LeakyReLU
    close(model(X), expected, 1e-5)


def test_a_slice_shares_norms_with_what_it_was_cut_from():
    model = net(nn.LeakyReLU(0.5), nn.Conv2d(4, 4, 1))
    part, whole = model[:3](X), model(X)
    head = convert(model[:3])
    assert kinds(head) == ["Sequential", "Conv2d", "BatchNorm2d", "Identity"]
    close(head(X), part, 1e-5)
    close(model(X), whole, 1e-5)  # still with its own activation, applied once
    assert head[1].weight is model[1].weight


def test_a_norm_held_twice_is_not_fused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net(nn.LeakyReLU(0.5))
            self.head = self.body[:2]
            self.kept = [net(nn.LeakyReLU(0.5))]  # not registered: not seen

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + self.head(x) + self.kept[0](x)

    model = Net()
    expected = model(X)
    assert kinds(convert(model)).count("LeakyReLU") == 1
    assert model.body[1] is model.head[1] and type(model.kept[0][1]) is nn.BatchNorm2d
    close(model(X), expected, 1e-5)


def test_fuse_false_where_a_loop_reads_the_layers():
    model = net(nn.ReLU())

    def features(model: nn.Sequential) -> list[torch.Tensor]:
        h, found = X, []
        for layer in model:
            found.append(h := layer(h))
        return found

    expected = features(model)
    for a, e in zip(features(convert(model, fuse=False)), expected, strict=True):
        close(a, e, 1e-5)


def test_an_optimizer_made_before_goes_on():
    model, plain = net(nn.ReLU()), net(nn.ReLU())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain)]
    convert(model)
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        m(X).square().sum().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p, q, 1e-5)
