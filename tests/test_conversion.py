"""convert: torchvision's resnet18 and a U-Net with instance norms, before and after."""

import copy

import torch
from parity import close
from torch import nn
from torchvision.models import resnet18

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
    torch.manual_seed(0)
    model = resnet18(num_classes=5).double()
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
