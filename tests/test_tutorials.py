"""TensorFlow's and Keras' systems: goldens in numpy from their formulas, in float64, NHWC."""

import numpy as np
import pytest
import torch
from parity import BACKENDS

import gannorm
from gannorm import use_backend
from gannorm.models import resblock
from gannorm.norms import functional as G
from gannorm.schema import BatchNormConfig

NHWC = (4, 4, 5, 6)  # N == H: one expand_dims too few then broadcasts along rows
LABELS = np.array([2, 0, 2, 1])
EPS = 1e-5
CENTER_SCALE = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with use_backend(request.param):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# The formulas


def moments(x, axes):
    mean = x.mean(axes, keepdims=True)
    return mean, ((x - mean) ** 2).mean(axes, keepdims=True)


def batch_normalization(x, mean, variance, offset, scale, eps):
    y = (x - mean) / np.sqrt(variance + eps)
    y = y if scale is None else scale * y
    return y if offset is None else y + offset


def group_normalization(x, groups, gamma, beta, eps):
    n, h, w, c = x.shape
    split = x.reshape(n, h, w, groups, c // groups)
    y = batch_normalization(split, *moments(split, (1, 2, 4)), None, None, eps).reshape(x.shape)
    return batch_normalization(y, 0.0, 1.0, beta, gamma, 0.0)


def instance_normalization(x, axis, gamma, beta, eps):
    axes = tuple(a for a in range(1, x.ndim) if a != axis % x.ndim)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    gamma, beta = (None if t is None else t.reshape(shape) for t in (gamma, beta))
    return batch_normalization(x, *moments(x, axes), beta, gamma, eps)


class ConditionBatchNorm:
    """Gamma and beta (N, C) picked by label; gamma_0, var_0: what they start from."""

    def __init__(self, channels, classes=3, gamma_0=1.0, var_0=1.0, decay=0.9):
        self.gamma = np.full((classes, channels), gamma_0)
        self.beta = np.zeros((classes, channels))
        self.mean, self.var = np.zeros(channels), np.full(channels, var_0)
        self.decay = decay

    def __call__(self, x, labels, training):
        mean, var = self.mean, self.var
        if training:
            mean, var = (t.reshape(-1) for t in moments(x, (0, 1, 2)))
            self.mean = self.decay * self.mean + (1 - self.decay) * mean
            self.var = self.decay * self.var + (1 - self.decay) * var
        gamma, beta = (t[labels][:, None, None] for t in (self.gamma, self.beta))
        return batch_normalization(x, mean, var, beta, gamma, EPS)


def conv(x, kernel, bias):
    """SAME, stride 1; kernel (C_out, C_in, k, k)."""
    pad = kernel.shape[2] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (1, 2))
    return np.einsum("nhwcij,ocij->nhwo", windows, kernel) + bias


def lrelu(x):
    return np.where(x > 0, x, 0.2 * x)


# To torch and back


def tensor(a):
    return None if a is None else torch.tensor(a)


def nchw(a):
    return torch.tensor(np.moveaxis(a, -1, 1))


def nhwc(t):
    return np.moveaxis(t.detach().cpu().numpy(), 1, -1)


def close(ours, golden):
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-10 * max(1.0, np.abs(golden).max()))


def affine(rng, channels, center, scale):
    gamma = rng.normal(1, 0.5, channels) if scale else None
    return gamma, rng.normal(0, 1, channels) if center else None


def randomize(rng, ours, golden):
    """Give a conditional layer and its golden the same tables."""
    for ours_table, name in ((ours.weight, "gamma"), (ours.bias, "beta")):
        table = rng.normal(1, 0.5, ours_table.shape)
        setattr(golden, name, table)
        ours_table.data = torch.tensor(table)


def test_tf_instance_norm(rng):
    x, scale, offset = rng.normal(3, 2, NHWC), rng.normal(1, 0.02, 6), np.zeros(6)
    norm = gannorm.InstanceNorm2d(6, affine=True).double()
    assert norm.eps == 1e-5 and sum(p.numel() for p in norm.parameters()) == 12
    norm.weight.data = torch.tensor(scale)
    golden = batch_normalization(x, *moments(x, (1, 2)), offset, scale, 1e-5)
    close(nhwc(norm(nchw(x))), golden)
    close(nhwc(G.instance_norm(nchw(x), None, None, tensor(scale), tensor(offset))), golden)


def test_tf_batch_norm_with_decay(rng):
    decay, gamma, beta = 0.9, rng.normal(1, 0.5, 6), rng.normal(0, 1, 6)
    norm = gannorm.BatchNorm2d(6, eps=EPS, momentum=1 - decay, var_estimator="biased").double()
    norm.weight.data, norm.bias.data = torch.tensor(gamma), torch.tensor(beta)
    moving_mean, moving_var = np.zeros(6), np.ones(6)
    for _ in range(3):
        x = rng.normal(3, 2, NHWC)
        mean, var = moments(x, (0, 1, 2))
        moving_mean = decay * moving_mean + (1 - decay) * mean.reshape(-1)
        moving_var = decay * moving_var + (1 - decay) * var.reshape(-1)
        close(nhwc(norm(nchw(x))), batch_normalization(x, mean, var, beta, gamma, EPS))
        close(norm.running_mean.cpu().numpy(), moving_mean)
        close(norm.running_var.cpu().numpy(), moving_var)
    golden = batch_normalization(x, moving_mean, moving_var, beta, gamma, EPS)
    close(nhwc(norm.eval()(nchw(x))), golden)
    close(norm.running_var.cpu().numpy(), moving_var)


@pytest.mark.parametrize("center,scale", CENTER_SCALE)
@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_keras_instance_normalization(rng, axis, eps, center, scale):
    """The statistics leave out the batch and `axis`, wherever it is."""
    x = rng.normal(3, 2, NHWC)
    gamma, beta = affine(rng, NHWC[axis], center, scale)
    y = G.instance_norm(
        tensor(np.moveaxis(x, axis, 1)), None, None, tensor(gamma), tensor(beta), eps=eps
    )
    ours = np.moveaxis(y.cpu().numpy(), 1, axis)
    close(ours, instance_normalization(x, axis, gamma, beta, eps))
    if axis != -1 and not (center or scale):
        fixed = batch_normalization(x, *moments(x, (1, 2)), None, None, eps)
        assert np.abs(ours - fixed).max() > 0.1


def test_condition_batch_norm(rng):
    golden = ConditionBatchNorm(6)
    norm = gannorm.ConditionalBatchNorm2d(6, 3, momentum=0.1, var_estimator="biased").double()
    close(norm.weight.detach().cpu().numpy(), golden.gamma)
    close(norm.running_var.cpu().numpy(), golden.var)
    randomize(rng, norm, golden)
    for training in (True, True, False):
        x = rng.normal(3, 2, NHWC)
        y = norm.train(training)(nchw(x), torch.tensor(LABELS))
        close(nhwc(y), golden(x, LABELS, training))
        close(norm.running_mean.cpu().numpy(), golden.mean)
        close(norm.running_var.cpu().numpy(), golden.var)


def test_condition_batch_norm_is_not_the_uncorrected_one(rng):
    x, labels = rng.normal(0, 1, NHWC), torch.tensor(LABELS)
    norm = gannorm.ConditionalBatchNorm2d(6, 3).double()
    # Gamma 0: every image becomes the same constant.
    assert not ConditionBatchNorm(6, gamma_0=0.0)(x, LABELS, True).any()
    assert nhwc(norm(nchw(x), labels)).std() > 0.99
    # Moving variance 0: a gain of 1 / sqrt(eps) in evaluation.
    gain = ConditionBatchNorm(6, var_0=0.0)(x, LABELS, False) / x
    np.testing.assert_allclose(gain, 316.2, rtol=1e-3)
    fresh = gannorm.ConditionalBatchNorm2d(6, 3).double().eval()
    close(nhwc(fresh(nchw(x), labels)) / x, np.full(NHWC, 1 / np.sqrt(1 + EPS)))


def test_condition_batch_norm_scales_samples_not_rows(rng):
    x, golden = rng.normal(0, 1, NHWC), ConditionBatchNorm(6)
    norm = gannorm.ConditionalBatchNorm2d(6, 3).double()
    randomize(rng, norm, golden)
    ours = nhwc(norm(nchw(x), torch.tensor(LABELS)))
    close(ours, golden(x, LABELS, True))
    rows = golden.gamma[LABELS][:, None], golden.beta[LABELS][:, None]  # (N, 1, C): one too few
    wrong = batch_normalization(x, *moments(x, (0, 1, 2)), rows[1], rows[0], EPS)
    assert wrong.shape == ours.shape and np.abs(ours - wrong).max() > 0.1


@pytest.mark.parametrize("in_channels", [5, 3])
def test_res_block(rng, monkeypatch, in_channels):
    """conv3, cbn, lrelu twice, plus the input, or conv1, cbn, lrelu of it where channels change."""
    monkeypatch.setattr(resblock, "_up", lambda x: x)
    config = BatchNormConfig(
        name="conditional_batch", backend="auto", eps=EPS, affine=True, weight_init=None,
        momentum=0.1, var_estimator="biased", running_var_init=1.0,
    )  # fmt: skip
    block = resblock.PostactBlock(in_channels, 5, gannorm.build_norm(config, 3)).double()
    names = ["1", "2"] if in_channels == 5 else ["1", "2", "shortcut"]
    norms = {"1": block.norm1, "2": block.norm2, "shortcut": getattr(block, "shortcut_norm", None)}
    convs = {"1": block.conv1, "2": block.conv2, "shortcut": block.shortcut}
    goldens = {name: ConditionBatchNorm(5) for name in names}
    for name in names:
        randomize(rng, norms[name], goldens[name])

    def layer(x, name, training):
        kernel, bias = (p.detach().cpu().numpy() for p in convs[name].parameters())
        return lrelu(goldens[name](conv(x, kernel, bias), LABELS, training))

    for training in (True, True, False):
        x = rng.normal(1, 2, (4, 4, 6, in_channels))
        y = block.train(training)(nchw(x), torch.tensor(LABELS))
        h = layer(layer(x, "1", training), "2", training)
        close(nhwc(y), h + (layer(x, "shortcut", training) if len(names) == 3 else x))


@pytest.mark.parametrize("center,scale", CENTER_SCALE)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_normalization(rng, groups, center, scale):
    """`groups` counts the groups: 1 is layer norm, one channel each is instance norm."""
    x, (gamma, beta) = rng.normal(3, 2, NHWC), affine(rng, 6, center, scale)
    golden = group_normalization(x, groups, gamma, beta, 1e-3)
    weight, bias = tensor(gamma), tensor(beta)
    close(nhwc(G.group_norm(nchw(x), groups, weight, bias, 1e-3)), golden)
    if groups == 6:
        close(golden, instance_normalization(x, -1, gamma, beta, 1e-3))
        y = G.instance_norm(nchw(x), None, None, weight, bias, eps=1e-3)
        close(nhwc(y), golden)
    if groups == 1 and center == scale:
        layer = gannorm.LayerNorm2d(6, eps=1e-3, affine=scale).double()
        if scale:
            layer.weight.data, layer.bias.data = weight, bias
        close(nhwc(layer(nchw(x))), golden)


def test_group_normalization_with_its_defaults(rng):
    x = rng.normal(3, 2, (2, 3, 3, 64))
    norm = gannorm.GroupNorm(32, 64, eps=1e-3).double()
    close(nhwc(norm(nchw(x))), group_normalization(x, 32, np.ones(64), np.zeros(64), 1e-3))


@pytest.mark.parametrize("center,scale", CENTER_SCALE)
@pytest.mark.parametrize("axes", [(-1,), (1, 2, 3)])
def test_layer_normalization(rng, axes, center, scale):
    """One value of gamma and beta for each normalized element; -1: over the channels alone."""
    x, shape = rng.normal(3, 2, NHWC), [NHWC[a] for a in axes]
    gamma, beta = affine(rng, shape, center, scale)
    golden = batch_normalization(x, *moments(x, axes), beta, gamma, 1e-3)
    y = G.layer_norm(tensor(x), shape, tensor(gamma), tensor(beta), 1e-3)
    close(y.cpu().numpy(), golden)


AXES = [((1, 2), (2, 3)), ((0,), 0), ((0, 1, 2), (0, 2, 3)), ((1, 2, 3), (-1, -2, -3)),
        ((3,), [1]), ((0, 1, 2, 3), (0, 1, 2, 3))]  # fmt: skip


@pytest.mark.parametrize("axes,dim", AXES, ids=str)
def test_moments_and_batch_normalization(rng, axes, dim):
    """Per plane, per position ([0] of a 4-D input), per channel, per sample, per pixel, of all."""
    x = rng.normal(3, 2, NHWC)
    golden = moments(x, axes)
    ours = G.moments(nchw(x), dim, keepdim=True)
    flat = G.moments(nchw(x), dim)
    for a, b, g in zip(ours, flat, golden, strict=True):
        close(nhwc(a), g)
        assert b.shape == a.squeeze(dim if isinstance(dim, int) else tuple(dim)).shape
        close(b.cpu().numpy().reshape(-1), a.cpu().numpy().reshape(-1))
    offset, scale = (rng.normal(1, 0.5, golden[0].shape) for _ in range(2))
    for o, s in ((offset, scale), (offset, None), (None, scale), (None, None)):
        o_, s_ = (None if t is None else nchw(t) for t in (o, s))
        y = G.batch_normalization(nchw(x), *ours, o_, s_, 1e-3)
        close(nhwc(y), batch_normalization(x, *golden, o, s, 1e-3))


def test_a_batch_of_one_image_is_fine(rng):
    x, (gamma, beta) = rng.normal(3, 2, (1, *NHWC[1:])), affine(rng, 6, True, True)
    golden = batch_normalization(x, *moments(x, (0, 1, 2)), beta, gamma, EPS)
    close(golden, instance_normalization(x, -1, gamma, beta, EPS))
    y = G.batch_norm(nchw(x), None, None, tensor(gamma), tensor(beta), True)
    close(nhwc(y), golden)
    assert np.abs(golden - beta).max() > 0.1


def test_one_value_per_channel(rng):
    """(x - mean) is 0 there: beta, which TensorFlow gives, and which we give if asked."""
    x, (gamma, beta) = rng.normal(3, 2, (1, 1, 1, 6)), affine(rng, 6, True, True)
    golden = batch_normalization(x, *moments(x, (0, 1, 2)), beta, gamma, EPS)
    assert (golden == beta).all()
    norm = gannorm.BatchNorm2d(6, momentum=0.1, var_estimator="biased").double()
    norm.weight.data, norm.bias.data = torch.tensor(gamma), torch.tensor(beta)
    with pytest.raises(ValueError, match=r"\(1, 6, 1, 1\)"):
        norm(nchw(x))
    norm.degenerate = "beta"
    assert (nhwc(norm(nchw(x))) == golden).all()
    close(norm.running_mean.cpu().numpy(), 0.1 * x.reshape(-1))
    close(norm.running_var.cpu().numpy(), np.full(6, 0.9))
    table = tensor(np.stack([beta, gamma])), tensor(np.stack([gamma, beta]))
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="one value per channel"):
        G.conditional_batch_norm(nchw(x), one, None, None, *table, True)
    y = G.conditional_batch_norm(nchw(x), one, None, None, *table, True, degenerate="beta")
    assert (nhwc(y) == golden).all()


def test_two_values_per_channel(rng):
    """Whatever they are, they become minus and plus gamma (but for eps), around beta."""
    x, (gamma, beta) = 100 * rng.normal(3, 2, (2, 1, 1, 6)), affine(rng, 6, True, True)
    golden = batch_normalization(x, *moments(x, (0, 1, 2)), beta, gamma, EPS)
    y = nhwc(G.batch_norm(nchw(x), None, None, tensor(gamma), tensor(beta), True))
    close(y, golden)
    np.testing.assert_allclose(np.abs(y - beta), np.broadcast_to(np.abs(gamma), y.shape), rtol=1e-5)
