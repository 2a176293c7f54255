"""Norms, converted models and both generators through torch.export, AOTInductor and ONNX: values,
gradients and statistics are the eager module's, at other sizes than those of the example too.
"""

import copy
import io
import warnings

import pytest
import torch
from pairs import pairs
from parity import close
from test_models import INSTANCE, batch
from test_tools import LEAKY, NORMS, X, make, same
from torch import nn
from torch.export import Dim

import gannorm
from gannorm import convert
from gannorm.models import ResBlockGenerator, ResnetGenerator

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
BIGGER = torch.cat([X, X.flip(2)], 2)[:, :, :9, :5].repeat(2, 1, 1, 1)[:5]  # (5, 4, 9, 5)
MORE = torch.tensor([2, 0, 1, 1, 2])


def resnet():
    models = pytest.importorskip("torchvision.models")
    net = convert(models.resnet18(num_classes=3))
    x = torch.randn(2, 3, 64, 64)
    other = torch.randn(3, 3, 96, 64)
    n, h, w = Dim("n", min=2, max=64), Dim("h", min=2, max=8), Dim("w", min=2, max=8)
    return net.double(), (x.double(),), (other.double(),), ({0: n, 2: 32 * h, 3: 32 * w},)


def unet():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Dropout(0.0), nn.SiLU(),
    )  # fmt: skip
    return image(convert(net))


def image(net: nn.Module):
    """For images of any size."""
    x, other = torch.randn(2, 3, 12, 12), torch.randn(3, 3, 16, 20)
    n, h, w = Dim("n", min=2, max=64), Dim("h", min=2, max=16), Dim("w", min=2, max=16)
    return net.double(), (x.double(),), (other.double(),), ({0: n, 2: 4 * h, 3: 4 * w},)


def sampler(conditional: bool, block: str):
    """ResBlock GAN: noise and labels to images."""
    net = ResBlockGenerator(batch(conditional), num_classes=10, z_dim=6, widths=[8, 8], block=block)
    sizes = [(torch.randn(n, 6).double(), torch.arange(n)) for n in (4, 7)]
    n = Dim("n", min=2, max=9)
    return net.double(), *sizes, ({0: n}, {0: n})


MODELS = {
    "resnet18": resnet,
    "unet": unet,
    "cyclegan": lambda: image(ResnetGenerator(3, 3, INSTANCE, width=4, blocks=1)),
    "cyclegan, batch": lambda: image(ResnetGenerator(3, 3, batch(), width=4, blocks=1)),
    "resblock": lambda: sampler(True, "postact"),
    "resblock, batch": lambda: sampler(False, "preact"),
}


def case(name: str):
    """The module, inputs, other inputs, and which dimensions are free."""
    torch.manual_seed(0)
    if name in MODELS:
        return MODELS[name]()
    if name in SPECIAL:
        kind, kwargs = SPECIAL[name]
    else:
        kind, kwargs = name, LEAKY
    net, inputs = make(kind, **kwargs)
    if name == "average":
        net.norm.momentum = None
    n, h, w = Dim("n", min=2, max=64), Dim("h", min=2, max=64), Dim("w", min=2, max=64)
    free = ({0: n, 2: h, 3: w}, {0: n})[: len(inputs)]
    return net, inputs, (BIGGER, MORE)[: len(inputs)], free


SPECIAL = {
    "biased": ("batch", {"var_estimator": "biased"}),
    "average": ("batch", {}),
    "float32": ("group", {"dtype": torch.float32}),
}
SLOW = ("resnet18", "cyclegan, batch", "resblock, batch")  # in the default tests by their parts


def some(*parameters):
    """All-pairs combinations of a name and switches; those of large models are slow tests."""
    return [
        pytest.param(*each, marks=[pytest.mark.slow] if each[0] in SLOW else [])
        for each in pairs(*parameters)
    ]


EXPORTS = some([*NORMS, *SPECIAL, *MODELS], [True, False], [True, False], [True, False])


def exported(net, inputs, free, strict: bool = False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, inputs, dynamic_shapes=free, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name,training,strict,dynamic", EXPORTS)
def test_torch_export(name, training, strict, dynamic):
    net, inputs, other, free = case(name)
    net.train(training)
    program = exported(net, inputs, free if dynamic else None, strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("gannorm" in target for target in targets), "runs without gannorm"
    if name != "average":
        assert any("_norm" in target for target in targets), "torch's own norms"
    same(program.module(), copy.deepcopy(net), other if dynamic else inputs, 1e-8)


def test_an_exported_batch_of_one_value():
    """torch's batch norm refuses it; ours gives the bias, and in a graph too."""
    norm = gannorm.BatchNorm2d(4, degenerate="beta").double()
    nn.init.normal_(norm.bias)
    x = torch.randn(1, 4, 1, 1).double()
    program = exported(norm, (x,), None)
    close(program.module()(x).flatten(), norm.bias, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NORMS, "unet", "cyclegan", "resblock"])
def test_aot_inductor(name, tmp_path):
    """Compiled ahead of time, with free sizes."""
    net, inputs, other, free = case(name)
    program = torch.export.export(net.eval(), inputs, dynamic_shapes=free)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "n.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for each in (inputs, other):
        close(run(*each), net(*each), 1e-8)


ONNX = some([*NORMS, *MODELS], [True, False], [True, False])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name,dynamo,dynamic", ONNX)
def test_onnx(name, dynamo, dynamic, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    net, inputs, other, free = case(name)
    net, inputs, other = (
        net.float().eval(),
        *(
            tuple(t.float() if t.is_floating_point() else t for t in each)
            for each in (inputs, other)
        ),
    )
    names, path = ["x", "labels"][: len(inputs)], str(tmp_path / "net.onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
        torch.onnx.export(
            net, inputs, path, dynamo=True, dynamic_shapes=free if dynamic else None,
            input_names=names, verbose=False,
        )  # fmt: skip
    else:
        axes = {k: {d: f"{k}{d}" for d in dims} for k, dims in zip(names, free, strict=True)}
        torch.onnx.export(
            net, inputs, path, dynamo=False, dynamic_axes=axes if dynamic else None,
            input_names=names,
        )  # fmt: skip
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not operators & {"ReduceSum", "Sqrt"}, "a norm is one operator"
    session = runtime.InferenceSession(path)
    each = other if dynamic else inputs
    (y,) = session.run(None, {k: t.numpy() for k, t in zip(names, each, strict=True)})
    close(torch.tensor(y), net(*each), 1e-5)
