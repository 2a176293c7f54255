"""torch's own test samples (OpInfo, ModuleInfo) of the norms that we share: the same values,
gradients and state, derivatives of every kind, and errors where torch has errors.

What differs on purpose stands in docs/norms.md, by the names in quotes; nothing else does.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import gannorm
from gannorm import functional as F

pytest.importorskip("expecttest")  # which torch's samples need
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
modules = pytest.importorskip("torch.testing._internal.common_modules")

OURS = {
    f"nn.functional.{f.__name__}": f
    for f in (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm)
}


def fresh(v):
    if not isinstance(v, Tensor):
        return v
    return v.detach().clone().requires_grad_(v.requires_grad)


def samples():
    for op in invocations.op_db:
        if op.name in OURS and not op.variant_test_name:
            for i, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=True)):
                yield pytest.param(op, sample, id=f"{op.name.split('.')[-1]}-{i}")


def run(f, sample):
    """Output, gradients, and the running statistics behind it."""
    x, args = fresh(sample.input), [fresh(v) for v in sample.args]
    kwargs = {name: fresh(v) for name, v in sample.kwargs.items()}
    y = f(x, *args, **kwargs)
    tensors = [t for t in (x, *args, *kwargs.values()) if isinstance(t, Tensor)]
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = [t for t in tensors if t.requires_grad]
    return y, torch.autograd.grad(y, leaves, dy), [t for t in tensors if not t.requires_grad]


@pytest.mark.parametrize("op,sample", samples())
def test_a_sample_of_torchs(op, sample):
    ours = OURS[op.name]
    if sample.input.dim() == 1 and ours is F.batch_norm:  # "one dimension"
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            run(ours, sample)
        return
    torch.testing.assert_close(run(ours, sample), run(op.op, sample), equal_nan=True)
    tensors = [sample.input, *sample.args, *sample.kwargs.values()]
    leaves = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]

    def call(*given):
        given = iter(given)
        parts = [next(given) if any(t is leaf for leaf in leaves) else fresh(t) for t in tensors]
        n = len(sample.args)
        kwargs = dict(zip(sample.kwargs, parts[n + 1 :], strict=True))
        return ours(parts[0], *parts[1 : n + 1], **kwargs)

    assert gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


def errors():
    for op in invocations.op_db:
        if op.name in OURS and op.error_inputs_func is not None:
            for i, error in enumerate(op.error_inputs("cpu")):
                yield pytest.param(OURS[op.name], error, id=f"{op.name.split('.')[-1]}-{i}")


@pytest.mark.parametrize("ours,error", errors())
def test_an_error_of_torchs(ours, error):
    sample = error.sample_input
    if not sample.input.numel():  # "no values"
        assert ours(sample.input, *sample.args, **sample.kwargs).shape == sample.input.shape
        return
    with pytest.raises(ValueError):  # "errors"
        ours(sample.input, *sample.args, **sample.kwargs)


def shared():
    return [i for i in modules.module_db if i.name.removeprefix("nn.") in gannorm.__all__]


def module_samples(errors: bool):
    for info in shared():
        of = info.module_error_inputs_func if errors else info.module_inputs_func
        for training in (True, False) if of is not None else ():
            for i, sample in enumerate(of(info, "cpu", torch.float64, True, training)):
                name = f"{info.name}-{'training' if training else 'evaluation'}-{i}"
                yield pytest.param(info.module_cls, sample, training, id=name)


def build(kind, constructor, training):
    module = kind(*constructor.args, **constructor.kwargs).double().train(training)
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p)
    return module


@pytest.mark.parametrize("theirs,sample,training", module_samples(False))
def test_a_module_sample_of_torchs(theirs, sample, training):
    results = []
    ours = getattr(gannorm, theirs.__name__)
    for kind in (ours, theirs):
        module = build(kind, sample.constructor_input, training)
        inputs = [fresh(t) for t in sample.forward_input.args]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = module(*inputs)
        dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        grads = torch.autograd.grad(y, [*inputs, *module.parameters()], dy)
        state = module.state_dict()
        if training and not y.numel():  # "empty batch"
            state.pop("num_batches_tracked", None)
        results.append((y, grads, dict(state)))
    torch.testing.assert_close(*results, equal_nan=True)
    module = build(ours, sample.constructor_input, training)
    before = {name: t.clone() for name, t in module.named_buffers()}

    def call(x, *parameters):
        module.load_state_dict(before, strict=False)
        named = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x,), strict=False)

    leaves = [fresh(sample.forward_input.args[0]), *map(fresh, module.parameters())]
    fast = {"fast_mode": True}
    assert gradcheck(call, leaves, **fast) and gradgradcheck(call, leaves, **fast)


@pytest.mark.parametrize("theirs,error,training", module_samples(True))
def test_a_module_error_of_torchs(theirs, error, training):
    sample = error.module_error_input
    with pytest.raises(error.error_type):
        module = build(getattr(gannorm, theirs.__name__), sample.constructor_input, training)
        module(*sample.forward_input.args)


def test_the_other_differences():
    """Those that none of torch's samples shows."""
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="takes 3 channels"):  # "channels"
        gannorm.InstanceNorm2d(3)(x)
    ours, theirs = gannorm.BatchNorm2d(4), nn.BatchNorm2d(4)
    x[0, 1, 0, 0] = torch.inf  # "not finite"
    ours(x), theirs(x)
    assert ours.running_mean.isfinite().all() and not theirs.running_mean.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):  # "autocast"
        assert gannorm.GroupNorm(2, 4)(x.bfloat16()).dtype is torch.bfloat16
    one = torch.randn(2, 4, 1, 1)  # "one value"
    assert (gannorm.GroupNorm(4, 4)(one) == 0).all()
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.GroupNorm(4, 4)(one[:1])
