"""convert on the models that people have, of torchvision, timm, diffusers, monai and
segmentation_models_pytorch, with random weights: output, gradients and state_dict, in training and
in evaluation, before and after; and what was left alone is what the function named.
"""

import logging
from importlib import import_module

import pytest
import torch
from test_convert import check
from torch import nn

import gannorm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the packages, about themselves
]
OURS = tuple(
    getattr(gannorm, name) for name in gannorm.__all__ if "Norm" in name and name[0].isupper()
)


def of(module: str, name: str, **kwargs):
    return lambda: getattr(pytest.importorskip(module), name)(**kwargs)


def timm(name: str):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=4)


class Unwrapped(nn.Module):
    """The tensor out of what a model returns."""

    def __init__(self, model: nn.Module, get) -> None:
        super().__init__()
        self.model, self.get = model, get

    def forward(self, *inputs):
        return self.get(self.model(*inputs))


def deeplab():
    vision = pytest.importorskip("torchvision.models.segmentation")
    model = vision.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    return Unwrapped(model, lambda y: y["out"])


def diffusion():
    model = pytest.importorskip("diffusers").UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return Unwrapped(model, lambda y: y.sample)


def smp(**kwargs):
    return lambda: pytest.importorskip("segmentation_models_pytorch").Unet(
        "resnet18", encoder_weights=None, **kwargs
    )


IMAGE, SMALL = (2, 3, 64, 64), (2, 3, 32, 32)
# model, shape of the input, norms that become ours, norms that stay
MODELS = {
    "resnet50": (of("torchvision.models", "resnet50", num_classes=4), IMAGE, 53, 0),
    "densenet121": (of("torchvision.models", "densenet121", num_classes=4), IMAGE, 121, 0),
    "mobilenet_v3": (of("torchvision.models", "mobilenet_v3_small", num_classes=4), IMAGE, 34, 0),
    "efficientnet_b0": (of("torchvision.models", "efficientnet_b0", num_classes=4), IMAGE, 49, 0),
    "deeplabv3": (deeplab, IMAGE, 60, 0),
    "timm resnetv2": (timm("resnetv2_50"), IMAGE, 0, 49),
    "timm convnext": (timm("convnext_atto"), IMAGE, 0, 17),
    "timm nfnet": (timm("nfnet_l0"), IMAGE, 0, 0),
    "timm efficientnet": (timm("efficientnet_b0"), IMAGE, 0, 49),
    "diffusers UNet2DModel": (diffusion, (2, 3, 16, 16), 31, 0),
    "monai BasicUNet 2d": (
        of("monai.networks.nets", "BasicUNet", spatial_dims=2, in_channels=3), SMALL, 18, 0,
    ),
    "monai BasicUNet 3d": (
        of("monai.networks.nets", "BasicUNet", in_channels=1, features=(4, 4, 8, 8, 8, 4)),
        (1, 1, 32, 32, 32), 18, 0,
    ),
    "monai UNet, batch": (
        of(
            "monai.networks.nets", "UNet", spatial_dims=2, in_channels=3, out_channels=2,
            channels=(4, 8, 16), strides=(2, 2), norm="batch",
        ), SMALL, 4, 0,
    ),
    "smp Unet": (smp(), IMAGE, 30, 0),
    "smp Unet, instance": (
        smp(decoder_use_norm={"type": "instancenorm", "affine": True}), IMAGE, 30, 0,
    ),
}  # fmt: skip


def norms(model: nn.Module) -> list[nn.Module]:
    kinds = import_module("gannorm.norms.convert").NORMS
    return [m for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("name", MODELS)
def test_before_and_after(name, caplog):
    make, shape, converted, left = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    for m in model.modules():
        if any(random in type(m).__name__ for random in ("Drop", "StochasticDepth")):
            m.p = m.drop_prob = 0.0  # no randomness between the two
    for norm in norms(model):
        if norm.weight is not None:
            nn.init.normal_(norm.weight, 1.0, 0.2)
    inputs = [torch.randn(shape).double()]
    if "diffusers" in name:
        inputs.append(torch.tensor(7))
    before = {id(m): type(m) for m in norms(model)}
    caplog.set_level(logging.WARNING)
    ours = check(model, *inputs)
    after = [m for m in norms(ours) if isinstance(m, OURS)]
    stayed = {n: m for n, m in ours.named_modules() if id(m) in before and not isinstance(m, OURS)}
    assert (len(after), len(stayed)) == (converted, left)
    named = {
        n for r in caplog.records if "convert leaves" in r.message
        for n in r.message.split("leaves ")[1].split(" as it is")[0].split(", ")
    }  # fmt: skip
    assert named == set(stayed)


def test_lazy_and_synchronized_norms(caplog):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.SyncBatchNorm(4))
    gannorm.convert(model)
    assert "leaves 1 as it is (LazyBatchNorm2d" in caplog.text
    assert "leaves 3 as it is (SyncBatchNorm" in caplog.text
    expected = model.eval()(x)
    assert type(gannorm.convert(model)[1]) is gannorm.BatchNorm2d
    assert type(model[3]) is nn.SyncBatchNorm
    torch.testing.assert_close(model(x), expected)
