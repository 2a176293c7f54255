"""`python -m benchmarks.profile`: what it counts as which part, which kind, and as the floor."""

from pathlib import Path

import pytest
import torch
from test_benchmarks import result
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import operators, step
from benchmarks import profile as command
from benchmarks.operators import Place, kind
from gannorm.training.run import Meter

TINY = {
    "cyclegan": ["model=cyclegan", *command.SMALL["cyclegan"], "data.batch_size=2"],
    "resblock_gan": ["model=resblock_gan", *command.SMALL["resblock_gan"]],
}


def test_a_part_is_without_those_inside_it():
    ticks = iter([0, 1, 11, 111, 1111, 11111])
    parts = command.Parts(lambda: next(ticks))
    with parts.part("rest"):
        with parts.part("optimizers"), parts.part("backward"), parts.part("backward"):
            pass
    assert parts.spent == {"rest": 1 + 10000, "optimizers": 10 + 1000, "backward": 100}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place(operators.G, operators.G, "aten::conv_transpose2d"), "convolution forward"),
        (Place("backward", operators.D, "_ConvolutionBackward"), "convolution backward"),
        (Place("backward", operators.G, "NormFunctionBackward"), "norm backward"),
        (Place(operators.G, operators.G, "aten::reflection_pad2d"), "padding"),
        (Place("backward", operators.D, "AvgPool2DBackward0"), "upsampling and pooling"),
        (Place("backward", operators.D, "ReluBackward0"), "activations and elementwise"),
        (Place(operators.G, operators.G, "aten::linear"), "linear"),
        (Place("backward", operators.D, "aten::add_"), "gradients added up"),
        (Place("backward", operators.D, "AddBackward0"), "activations and elementwise"),
        (Place("backward", operators.SPECTRAL, "MvBackward0"), "spectral norm"),
        (Place("backward", "rest", "MeanBackward0"), operators.LOSS),
        (Place("optimizers", "optimizers", "aten::linalg_vector_norm"), "optimizers"),
        (Place(operators.G, operators.G), operators.REST),
        (Place(operators.G, operators.G, "somebody::s"), ""),
    ],
)
def test_kinds(place: Place, expected: str):
    assert kind(place) == expected and (expected in operators.OPERATORS or not expected)


def test_a_backward_pass_is_of_what_it_differentiates():
    """The second derivative of what a spectral norm computes is the spectral norm's too."""
    x = torch.rand(4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function(operators.D):
            with record_function(operators.SPECTRAL):
                y = x.tanh()
            z = y.sigmoid()
        with record_function("backward"):
            (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        with record_function("rest"):
            loss = first.square().sum()
        with record_function("backward"):
            loss.backward()
    found: dict[str, set[str]] = {}
    places = operators.Places(list(profiler.events()))
    for event in profiler.events():
        place = places.of(event)
        found.setdefault(place.operator, set()).add(place.of)
    assert found["TanhBackward0"] == found["TanhBackwardBackward0"] == {operators.SPECTRAL}
    assert found["SigmoidBackward0"] == {operators.D} and found["PowBackward0"] == {"rest"}


def by_hand(nets: list[nn.Module]) -> list[int]:
    """What runs in the list's layers from now on: operations, in a list that grows."""

    def convolved(module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        taps = module.weight[0, 0].numel()
        transposed = isinstance(module, nn.ConvTranspose2d)
        places = inputs[0].numel() * y.shape[1] if transposed else y.numel() * inputs[0].shape[1]
        found.append(2 * taps * places * (4 if getattr(module, "pool", False) else 1))

    found: list[int] = []
    for module in [m for net in nets for m in net.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(convolved)
    return found


@pytest.mark.parametrize("name", TINY)
def test_the_floor_is_what_the_layers_compute(name: str):
    run = step.Trained("ours", TINY[name], "cpu", synthetic=True)
    hands = {
        operators.G: by_hand(list(run.task.generators.values())),
        operators.D: by_hand(list(run.task.discriminators.values())),
    }
    counted = command.operations(run)
    for part, hand in hands.items():
        assert counted[part][0] == sum(hand) > 0
    forward = sum(counted[part][0] for part in hands)
    assert 0.5 * forward < counted["backward"][0] < 4 * forward  # penalties differentiate twice
    assert bool(counted[operators.G][1]) == (name == "resblock_gan")  # a linear layer
    assert not any(sum(n) for part, n in counted.items() if part not in (*hands, "backward"))


def test_operators_are_all_of_a_step():
    run = step.Trained("ours", TINY["resblock_gan"], "cpu", synthetic=True)
    kinds, unknown = command.by_operator(run, 1)
    expected = {"convolution forward", "convolution backward", "norm forward", "norm backward",
                "spectral norm", "linear", "optimizers", "EMA", operators.LOSS}  # fmt: skip
    assert not [name for name in expected if not kinds[name] > 0]
    assert sum(unknown.values()) < 0.02 * sum(kinds.values()), unknown


def test_a_step_that_is_watched_is_the_same_step():
    runs = [step.Trained("ours", TINY["cyclegan"], "cpu", synthetic=True) for _ in range(2)]
    assert runs[0].first == runs[1].first
    parts, meter = command.Parts(lambda: 0.0), Meter(1)
    torch.manual_seed(0)
    command.watched_step(runs[0], parts, meter)
    torch.manual_seed(0)
    losses = {name: float(value) for name, value in runs[1].step().items()}
    assert {name: float(value) for name, value in meter.sums.items()} == losses
    assert parts.spent.keys() == set(operators.PARTS)
    assert torch.autograd.grad.__name__ == "grad"  # as it was


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "profile.json"
    assert command.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    found, told = result(out), capsys.readouterr().out
    assert [case["name"] for case in found["cases"]] == [
        name for cases in command.CASES.values() for name in cases
    ]
    for case in found["cases"]:
        assert case["parts_ms"].keys() == set(operators.PARTS)
        assert min(case["parts_ms"].values()) > 0 and case["step_ms"] > 0
        assert list(case["operators_ms"]) == list(operators.OPERATORS)
        assert case["floor_ms"]["operators"]["convolution forward"] > 0
        ratio = case["floor_ms"]["parts"]["backward"] * max(found["gflops"].values()) * 1e6
        assert ratio == pytest.approx(sum(case["operations"]["backward"]))
        assert case["name"] in told
    assert told.count("| backward |") == 2 and "| convolution backward |" in told
