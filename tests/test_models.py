"""The published sizes and keys, the shapes at other sizes, both kinds of block."""

import pytest
import torch

from gannorm.models import (
    PatchDiscriminator,
    ProjectionDiscriminator,
    ResBlockGenerator,
    ResnetGenerator,
)
from gannorm.models.norm_factory import NormFactory, build_norm
from gannorm.schema import BatchNormConfig, InstanceNormConfig, NoNormConfig

INSTANCE = build_norm(
    InstanceNormConfig(name="instance", backend="auto", eps=1e-5, affine=False, weight_init=None)
)


def batch(conditional: bool = False, weight_init: list[float] | None = None) -> NormFactory:
    name = "conditional_batch" if conditional else "batch"
    config = BatchNormConfig(
        name=name, backend="auto", eps=1e-5, affine=True, weight_init=weight_init, momentum=0.1,
        var_estimator="unbiased", running_var_init=1.0,
    )  # fmt: skip
    return build_norm(config, 10)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_published_parameter_counts():
    assert count(ResnetGenerator(3, 3, INSTANCE, blocks=9)) == 11_378_179
    assert count(ResnetGenerator(3, 3, INSTANCE, blocks=6)) == 7_837_699
    assert count(PatchDiscriminator(3, INSTANCE)) == 2_764_737


def test_generator_keys_are_the_references():
    net = ResnetGenerator(3, 3, INSTANCE, blocks=9)
    keys = set(net.state_dict())
    convs = [1, 4, 7, 19, 22, 26]
    blocks = [f"model.{i}.conv_block.{j}" for i in range(10, 19) for j in (1, 5)]
    names = [f"model.{i}" for i in convs] + blocks
    assert keys == {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    six = ResnetGenerator(3, 3, INSTANCE, blocks=6, dropout=True).state_dict()
    assert "model.23.bias" in six and "model.10.conv_block.6.weight" in six


def test_discriminator_keys_and_logits():
    net = PatchDiscriminator(3, INSTANCE)
    assert {k.split(".")[1] for k in net.state_dict()} == {"0", "2", "5", "8", "11"}
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_a_cyclegans_norm_weights_are_the_references_unless_given():
    layer = ResnetGenerator(3, 3, batch(), width=64, blocks=0).model[2]
    assert 0.01 < layer.weight.std() < 0.03 and abs(layer.weight.mean() - 1) < 0.02
    for net in (
        ResnetGenerator(3, 3, batch(weight_init=[0.0, 0.0]), width=4, blocks=1),
        PatchDiscriminator(3, batch(weight_init=[0.0, 0.0]), width=4),
    ):
        norms = [n for n in net.modules() if isinstance(n, torch.nn.BatchNorm2d)]
        convolutions = [n for n in net.modules() if isinstance(n, torch.nn.Conv2d)]
        assert norms and not any(n.weight.any() for n in norms)
        assert all(n.weight.any() for n in convolutions)


def test_convolutions_have_a_bias_exactly_without_an_affine_behind_them():
    net = ResnetGenerator(3, 3, batch(), width=4, blocks=1)
    assert "model.1.bias" not in net.state_dict()
    assert "model.18.bias" in net.state_dict()  # the last one
    none = ResnetGenerator(
        3, 3, build_norm(NoNormConfig(name="none", backend="auto")), width=4, blocks=1
    )
    assert "model.1.bias" in none.state_dict()


def test_generator_equals_the_plain_torch_sequence():
    """Fused norm, activation and residual against the layers written out one by one."""
    torch.manual_seed(0)
    net = ResnetGenerator(3, 3, INSTANCE, width=4, blocks=1, downsamplings=1).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    nn, F = torch.nn, torch.nn.functional
    conv = {i: m for i, m in enumerate(net.model) if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}

    def convolved(layer, x):
        padded = F.pad(x, (layer.padding[0],) * 4, "reflect")
        return F.conv2d(padded, layer.weight, layer.bias)

    h = F.relu(F.instance_norm(convolved(conv[1], x)))
    h = F.relu(F.instance_norm(conv[4](h)))
    block = net.model[7].conv_block
    r = F.relu(F.instance_norm(convolved(block[1], h)))
    h = h + F.instance_norm(convolved(block[5], r))
    h = F.relu(F.instance_norm(conv[8](h)))
    y = torch.tanh(convolved(conv[12], h))
    torch.testing.assert_close(net(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", ["preact", "postact"])
@pytest.mark.parametrize("conditional", [True, False])
def test_resblock_generator(block: str, conditional: bool):
    torch.manual_seed(0)
    net = ResBlockGenerator(
        batch(conditional), num_classes=10, z_dim=8, widths=[8, 8, 4], block=block
    )
    z, labels = torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 9])
    # Away from the start, where all rows of a table are equal.
    for name, p in net.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.5)
    y = net(z, labels)
    assert y.shape == (5, 3, 16, 16) and y.abs().max() <= 1
    assert not torch.allclose(y, net(z, labels.roll(1)))  # the label matters
    net.eval()
    assert torch.allclose(net(z, labels)[:2], net(z[:2], labels[:2]), atol=1e-5)


def test_postact_block_is_the_tutorials():
    """conv3, norm, LeakyReLU(0.2) twice; conv1, norm, LeakyReLU where the channels change."""
    from gannorm.models.resblock import PostactBlock

    torch.manual_seed(0)
    F = torch.nn.functional
    for channels in (4, 6):
        block = PostactBlock(4, channels, batch())
        x = torch.randn(3, 4, 5, 5)
        up = F.interpolate(x, scale_factor=2)

        def bn(t: torch.Tensor) -> torch.Tensor:
            return F.leaky_relu(F.batch_norm(t, None, None, training=True), 0.2)

        skip = up if channels == 4 else bn(block.shortcut(up))
        expected = bn(block.conv2(bn(block.conv1(up)))) + skip
        torch.testing.assert_close(block(x, None), expected, rtol=1e-4, atol=1e-5)


def test_preact_block_is_sngans():
    from gannorm.models.resblock import PreactBlock

    torch.manual_seed(0)
    F = torch.nn.functional
    block = PreactBlock(4, 6, batch())
    x = torch.randn(3, 4, 5, 5)

    def bn(t: torch.Tensor) -> torch.Tensor:
        return F.relu(F.batch_norm(t, None, None, training=True))

    h = block.conv2(bn(block.conv1(bn(x))))  # conv1 upsamples
    expected = h + block.shortcut(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(block(x, None), expected, rtol=1e-4, atol=1e-5)


def test_biases_that_a_norm_takes_off_are_not_trained():
    """Whatever they are, the output is the same; all others are trained."""
    torch.manual_seed(0)
    nets = (ResnetGenerator(3, 3, INSTANCE, width=4, blocks=1),
            PatchDiscriminator(3, INSTANCE, width=4, layers=2))  # fmt: skip
    for net, count in zip(nets, (7, 2), strict=True):
        net.double()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        before, frozen = net(x), [p for p in net.parameters() if not p.requires_grad]
        assert len(frozen) == count
        with torch.no_grad():
            for bias in frozen:
                bias.normal_()
        torch.testing.assert_close(net(x), before, rtol=1e-10, atol=1e-10)
        net(x).square().sum().backward()
        assert all((p.grad.abs() > 0).any() for p in net.parameters() if p.requires_grad)
    with_batch_norm = ResnetGenerator(3, 3, batch(), width=4, blocks=1)
    assert all(p.requires_grad for p in with_batch_norm.parameters())


def test_projection_discriminator():
    torch.manual_seed(0)
    net = ProjectionDiscriminator(num_classes=10, widths=[8, 8, 8], downsamplings=2)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    logits = net(x, labels)
    assert logits.shape == (4,)
    with torch.no_grad():
        difference = net.eval()(x, labels) - net(x, labels.roll(1))
        h = torch.relu(net.blocks(x)).sum((2, 3))
        rows = net.embedding.weight
        expected = ((rows[labels] - rows[labels.roll(1)]) * h).sum(1)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4)


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    net = ProjectionDiscriminator(num_classes=3, widths=[8, 8], init="xavier")
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for _ in range(50):
        net(x, labels)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.Embedding):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), ord=2)
            assert abs(largest.item() - 1) < 0.02
