"""The layers: torch's constructors and state_dicts, training and evaluation, the factory."""

import pytest
import torch
from parity import close
from torch import nn

import gannorm
from gannorm import ConditionalBatchNorm2d, ConditionalInstanceNorm2d, build_norm
from gannorm.models.norm_factory import apply_norm
from gannorm.norms.base import NoNorm
from gannorm.schema import (
    BatchNormConfig,
    GroupNormConfig,
    InstanceNormConfig,
    LayerNormConfig,
    NoNormConfig,
)

TWINS = [
    (gannorm.InstanceNorm2d, nn.InstanceNorm2d, (6,), {}),
    (
        gannorm.InstanceNorm2d,
        nn.InstanceNorm2d,
        (6,),
        {"affine": True, "track_running_stats": True},
    ),
    (gannorm.BatchNorm2d, nn.BatchNorm2d, (6,), {}),
    (gannorm.BatchNorm2d, nn.BatchNorm2d, (6,), {"momentum": None, "affine": False}),
    (gannorm.BatchNorm2d, nn.BatchNorm2d, (6,), {"track_running_stats": False}),
    (gannorm.GroupNorm, nn.GroupNorm, (3, 6), {"eps": 1e-3}),
]


@pytest.mark.parametrize("ours,theirs,args,kwargs", TWINS)
def test_twins(ours, theirs, args, kwargs):
    """State moves both ways; three training steps and evaluation give the same."""
    torch.manual_seed(0)
    a, b = ours(*args, **kwargs), theirs(*args, **kwargs)
    for p in b.parameters():
        nn.init.normal_(p)
    a.load_state_dict(b.state_dict())
    assert isinstance(a, theirs)
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5)
        close(a(x), b(x), 1e-5)
    for key, value in b.state_dict().items():
        close(a.state_dict()[key], value, 1e-5)
    b.load_state_dict(a.state_dict())
    close(a.eval()(x), b.eval()(x), 1e-5)


def test_epilogue_of_a_layer():
    x, skip = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    norm = gannorm.InstanceNorm2d(6, activation="relu")
    plain = nn.InstanceNorm2d(6)
    close(norm(x, residual=skip), torch.relu(plain(x) + skip), 1e-5)
    after = gannorm.GroupNorm(2, 6, activation="leaky_relu", residual_after_activation=True)
    expected = nn.functional.leaky_relu(nn.GroupNorm(2, 6)(x), 0.2) + skip
    close(after(x, residual=skip), expected, 1e-5)
    assert "activation=leaky_relu(0.2)" in repr(after)


@pytest.mark.parametrize("kind", [ConditionalBatchNorm2d, ConditionalInstanceNorm2d])
def test_conditional_layers(kind):
    torch.manual_seed(0)
    norm = kind(6, 3, weight_init=(1.0, 0.5))
    assert norm.weight.shape == norm.bias.shape == (3, 6)
    assert norm.weight.std() > 0.1 and not norm.bias.any()
    x, labels = torch.randn(4, 6, 4, 4), torch.tensor([0, 2, 2, 1])
    y = norm(x, labels)
    assert not torch.allclose(y, norm(x, labels.flip(0)))
    again = kind(6, 3)
    again.load_state_dict(norm.state_dict())
    close(again.eval()(x, labels), norm.eval()(x, labels), 1e-6)
    with pytest.raises(ValueError, match="6 channels"):
        norm(x[:, :5], labels)


def test_conditional_batch_norm_in_evaluation_multiplies_by_the_gain():
    """Training and evaluation agree once the running statistics are the batch's."""
    torch.manual_seed(0)
    norm = ConditionalBatchNorm2d(3, 2, momentum=1.0, var_estimator="biased")
    nn.init.normal_(norm.weight)
    x, labels = torch.randn(8, 3, 4, 4), torch.arange(8) % 2
    y = norm(x, labels)
    assert norm.num_batches_tracked == 1
    close(norm.eval()(x, labels), y, 1e-5)


def test_layer_norm_2d_is_group_norm_of_one_group():
    x = torch.randn(2, 6, 4, 4)
    close(gannorm.LayerNorm2d(6)(x), nn.functional.layer_norm(x, (6, 4, 4)), 1e-5)
    assert set(gannorm.LayerNorm2d(6).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 2), (4, 6, 2, 3, 2)], ids=str)
def test_group_norm_of_any_dimension(shape):
    torch.manual_seed(0)
    x, skip = torch.randn(shape), torch.randn(shape)
    ours, theirs = gannorm.GroupNorm(2, 6, activation="relu"), nn.GroupNorm(2, 6)
    close(ours(x, residual=skip), torch.relu(theirs(x) + skip), 1e-5)
    close(gannorm.LayerNorm2d(6)(x), nn.GroupNorm(1, 6)(x), 1e-5)


def test_instance_norm_of_one_image():
    """(C, H, W), the running statistics included."""
    torch.manual_seed(0)
    kwargs = {"affine": True, "track_running_stats": True}
    ours, theirs = (m.InstanceNorm2d(6, **kwargs) for m in (gannorm, nn))
    x, skip = torch.randn(6, 5, 4, requires_grad=True), torch.randn(6, 5, 4)
    close(ours(x, residual=skip), theirs(x) + skip, 1e-5)
    close(ours.running_mean, theirs.running_mean, 1e-6)
    close(ours.running_var, theirs.running_var, 1e-6)
    close(ours.eval()(x), theirs.eval()(x), 1e-5)
    a, b = (torch.autograd.grad(n.train()(x).pow(3).sum(), x)[0] for n in (ours, theirs))
    close(a, b, 1e-5)


@pytest.mark.parametrize(
    "norm,shape,words",
    [
        (gannorm.InstanceNorm2d(6), (2, 6), r"\(N, C, H, W\) or \(C, H, W\).*\(2, 6\)"),
        (gannorm.InstanceNorm2d(6), (2, 5, 4, 4), r"6 channels.*dimension 1.*\(2, 5, 4, 4\)"),
        (gannorm.InstanceNorm2d(6), (2, 6, 5), r"6 channels.*dimension 0.*\(2, 6, 5\)"),
        (gannorm.BatchNorm2d(6), (6, 4, 4), r"\(N, C, H, W\).*\(6, 4, 4\)"),
        (gannorm.BatchNorm2d(6, affine=False), (2, 5, 4, 4), r"6 channels.*got 5"),
        (gannorm.GroupNorm(2, 6), (6,), r"\(N, C, ...\).*\(6,\)"),
        (gannorm.GroupNorm(2, 6, affine=False), (2, 4), r"6 channels.*\(2, 4\)"),
        (gannorm.LayerNorm2d(6), (2, 4, 3), r"6 channels.*\(2, 4, 3\)"),
        (ConditionalInstanceNorm2d(6, 3), (6, 4, 4), r"\(N, C, H, W\).*\(6, 4, 4\)"),
        (ConditionalBatchNorm2d(6, 3), (2, 5, 4, 4), r"6 channels.*got 5"),
    ],
)
def test_wrong_shapes_are_refused_by_layer(norm, shape, words):
    labels = (torch.zeros(2, dtype=torch.int64),) if hasattr(norm, "num_classes") else ()
    with pytest.raises(ValueError, match=rf"{type(norm).__name__}\(.*{words}"):
        norm(torch.randn(shape), *labels)
    with pytest.raises(TypeError, match=rf"{type(norm).__name__}\(.*int32.*float"):
        norm(torch.ones(2, 6, 4, 4).int(), *labels)
    with pytest.raises(TypeError, match=rf"{type(norm).__name__}\(.*list"):
        norm([1.0], *labels)


@pytest.mark.parametrize("groups", [0, -1, 4])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ValueError, match=rf"GroupNorm: num_groups={groups} .*6.*1, 2, 3, 6"):
        gannorm.GroupNorm(groups, 6)
    with pytest.raises(TypeError, match="num_groups must be an int, got 2.0"):
        gannorm.GroupNorm(2.0, 6)


EPS = {"backend": "auto", "eps": 1e-3, "affine": True, "weight_init": None}
RUNNING = {"momentum": 0.3, "var_estimator": "biased", "running_var_init": 1.0}
BATCH = {**EPS, **RUNNING}


@pytest.mark.parametrize(
    "config,kind",
    [
        (InstanceNormConfig(name="instance", **EPS), gannorm.InstanceNorm2d),
        (BatchNormConfig(name="batch", **BATCH), gannorm.BatchNorm2d),
        (GroupNormConfig(name="group", num_groups=4, **EPS), gannorm.GroupNorm),
        (LayerNormConfig(name="layer", **EPS), gannorm.LayerNorm2d),
        (NoNormConfig(name="none", backend="auto"), NoNorm),
        (InstanceNormConfig(name="conditional_instance", **EPS), ConditionalInstanceNorm2d),
        (BatchNormConfig(name="conditional_batch", **BATCH), ConditionalBatchNorm2d),
    ],
)
def test_build_norm(config, kind):
    factory = build_norm(config, num_classes=3)
    norm = factory(8, activation="relu")
    assert type(norm) is kind
    assert getattr(norm, "eps", 1e-3) == 1e-3
    assert getattr(norm, "momentum", 0.3) in (0.3, 0.1)  # instance norm keeps torch's
    x, labels = torch.randn(2, 8, 4, 4), torch.tensor([0, 2])
    skip = torch.randn_like(x)
    y = apply_norm(norm, x, labels, residual=skip)
    assert y.shape == x.shape and (y >= 0).all()
    assert factory.conv_bias == (kind is NoNorm)
    plain = factory.unconditional()(8)
    assert not isinstance(plain, ConditionalBatchNorm2d | ConditionalInstanceNorm2d)
    assert apply_norm(plain, x, None).shape == x.shape


@pytest.mark.parametrize("name", ["batch", "conditional_batch", "group"])
def test_start_values_of_a_config(name):
    """Of every layer a factory makes, a conditional norm's unconditional ones too."""
    start = {**EPS, "weight_init": [0.5, 0.0]}
    config = (
        GroupNormConfig(name=name, num_groups=4, **start)
        if name == "group"
        else BatchNormConfig(name=name, **{**BATCH, **start, "running_var_init": 0.25})
    )
    factory = build_norm(config, 3)
    for layer in (factory(8), factory.unconditional()(8)):
        assert (layer.weight == 0.5).all() and (layer.bias == 0).all()
        assert (getattr(layer, "running_var", torch.tensor(0.25)) == 0.25).all()


def test_conditional_norm_needs_classes():
    with pytest.raises(ValueError, match="conditional_batch"):
        build_norm(BatchNormConfig(name="conditional_batch", **BATCH))
