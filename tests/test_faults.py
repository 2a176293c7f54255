"""Each warning is triggered by a training run made to fail in that way; figures by hand."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gannorm.diagnostics.faults import (
    balance_faults,
    checkerboard,
    diversity,
    polarity,
    sample_faults,
)
from gannorm.diagnostics.nonfinite import first_nonfinite
from gannorm.tasks import Task
from gannorm.training import loop, watch
from gannorm.training.dashboard import Dashboard
from gannorm.training.loop import train
from gannorm.training.watch import Watch

pytestmark = pytest.mark.usefixtures("quick_runs")
ROOT = Path(__file__).parents[1]
PATIENCE = 20  # steps, here; a fault of the first evaluation is reported at the third of four
SHORT = [
    "data.batch_size=4", "trainer.log_every=10", "trainer.sample_every=1000",
    "trainer.eval_every=15", "trainer.steps=60",
]  # fmt: skip
MODELS = {
    "resblock_gan": [
        "model=resblock_gan", "data.image_size=8", "model.g_widths=[16,16]", "model.d_widths=[16]",
        "model.d_downsamplings=1", "model.z_dim=8",
    ],
    "cyclegan": [
        "data.image_size=8", "model.width=8", "model.blocks=1", "model.d_width=4",
        "model.downsamplings=1", "model.d_layers=1",
    ],
}  # fmt: skip


def run(folder: Path, model: str, *overrides: str) -> None:
    """Without the dashboard, most of an evaluation's time and nothing that is looked at here."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        raw = compose("config", [*MODELS[model], *SHORT, *overrides])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "PATIENCE", PATIENCE)
        patch.setattr(Dashboard, "show", lambda self, step, evaluation: None)
        train(raw, folder)


def health(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for key, value in json.loads(line).items():
            if key.startswith("health/"):
                found.setdefault(key.removeprefix("health/"), []).append(value)
    return found


def warned(folder: Path, said: str) -> dict[str, str]:
    """The warnings of a run, the same in the print and in TensorBoard."""
    events = EventAccumulator(str(folder)).Reload()
    texts = {}
    for tag in events.Tags()["tensors"]:
        if tag.startswith("health/"):
            (event, *_) = events.Tensors(tag)
            texts[tag.split("/")[1]] = event.tensor_proto.string_val[0].decode()
            assert f"warning: step {event.step}: {list(texts.values())[-1]}\n" in said
    for name, values in health(folder).items():
        assert (name in texts) == (1.0 in values), name
    return texts


def broken(monkeypatch, change) -> None:
    """Every task that is trained is changed by `change(task)` first."""
    build = loop.build_task

    def build_broken(*arguments) -> Task:
        task = build(*arguments)
        change(task)
        return task

    monkeypatch.setattr(loop, "build_task", build_broken)


def bias_only(task: Task) -> None:
    """The generator sees nothing of its noise: one image a class."""
    for net in (task.generators["G"], task.averaged["G"]):
        net.linear.weight.requires_grad_(False).zero_()


def saturated(task: Task) -> None:
    with torch.no_grad():
        task.generators["G"].conv.bias.fill_(100.0)


def gamma_zero(task: Task) -> None:
    for net in (task.generators["G"], task.averaged["G"]):
        net.norm.weight.requires_grad_(False).zero_()


def nothing(task: Task) -> None:
    pass


SLOW = ["optim.lr_g=1e-6", "optim.lr_d=1e-6"]
FAILURES = {
    "discriminator_wins": (
        "resblock_gan",
        ["loss=hinge", "optim.lr_d=0.01", "optim.lr_g=1e-9", "model.d_spectral_norm=false",
         "data.batch_size=16", "trainer.steps=100"],
        nothing, "the discriminator wins outright",
    ),
    "discriminator_loses": ("resblock_gan", ["optim.lr_d=1e-12"], nothing, "raise optim.lr_d"),
    "vanishing_gradient": ("resblock_gan", SLOW, saturated, "norm 0.0e+00"),
    "mode_collapse": ("resblock_gan", [], bias_only, "samples vary 0.00 times"),
    # It asks for the digits' own brightness, and the other domain is inverted.
    "colour_inversion": (
        "cyclegan", ["model.identity_weight=20", "optim.lr_g=2e-3"], nothing, "(correlation -0."
    ),
    # Transposed convolutions that have not learned to cover up their uneven overlap.
    "checkerboard": ("cyclegan", SLOW, nothing, "samples AtoB"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_made_to_fail(name, tmp_path, capsys, monkeypatch):
    model, overrides, change, words = FAILURES[name]
    broken(monkeypatch, change)
    run(tmp_path, model, *overrides)
    assert words in warned(tmp_path, capsys.readouterr().out)[name]
    values = health(tmp_path)[name]
    assert values[0] == 0 and 1 in values


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["rpgan", "wgan_gp"])
def test_a_run_that_learns_warns_of_nothing(loss, tmp_path, capsys):
    length = ["trainer.steps=220", "trainer.eval_every=55"]
    run(tmp_path, "resblock_gan", f"loss={loss}", "data.batch_size=16", *length)
    assert not warned(tmp_path, capsys.readouterr().out)
    assert set(health(tmp_path)) >= {"discriminator_wins", "mode_collapse", "norms"}


@pytest.mark.parametrize(
    "overrides,change,words",
    [
        (["norm.momentum=0"], nothing, "G.blocks.0.norm1: running statistics never moved"),
        (["norm.momentum=1e-4"], nothing, "running statistics far from the batch's (3."),
        ([], gamma_zero, "G.norm: dead weights: 100% below 0.001"),
        (["optim.lr_g=2000"], nothing, "exploding: weight up to"),
    ],
)
def test_a_norm_made_to_fail(overrides, change, words, tmp_path, capsys, monkeypatch):
    broken(monkeypatch, change)
    run(tmp_path, "resblock_gan", *overrides)
    assert words in warned(tmp_path, capsys.readouterr().out)["norms"]


# ---- NaN and Inf


@pytest.mark.parametrize("evaluated,seen", [(1000, 20), (15, 15)])
def test_the_first_layer_with_nan_is_named(evaluated, seen, tmp_path, capsys, monkeypatch):
    """A weight that overflows at step 7, seen at the next log or, before it is evaluated, then; in
    a network of many layers."""
    done = []

    def overflow(task: Task) -> None:
        step = task.train_step

        def failing(batches):
            done.append(1)
            if len(done) == 7:
                with torch.no_grad():
                    task.generators["G"].blocks[0].conv2.weight[0, 0] = float("inf")
            return step(batches)

        task.train_step = failing

    broken(monkeypatch, overflow)
    with pytest.raises(FloatingPointError, match=r"output of G blocks\.0\.conv2 \(Conv2d\); lower"):
        run(tmp_path, "resblock_gan", "trainer.log_every=20", f"trainer.eval_every={evaluated}")
    assert len(done) == seen + 1  # the last one again
    assert health(tmp_path)["not_finite"] == [1.0]
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("health/not_finite/text_summary")
    assert b"blocks.0.conv2" in event.tensor_proto.string_val[0]


@pytest.mark.parametrize("model,rate", [("resblock_gan", "1e30"), ("cyclegan", "1e38")])
def test_a_rate_that_is_far_too_high(model, rate, tmp_path):
    with pytest.raises(
        FloatingPointError, match="first in the (output of|gradient that arrives at) [GD]"
    ):
        run(tmp_path, model, f"optim.lr_g={rate}", f"optim.lr_d={rate}", "norm=none")


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers)


def test_first_nonfinite_forward_and_backward():
    good = net()
    x = torch.randn(2, 3)
    assert first_nonfinite({"N": good}, lambda: good(x).sum().backward()) is None
    assert not any(module._forward_hooks for module in good.modules())
    with torch.no_grad():
        good[1][0].weight[0, 0] = float("nan")
    found = first_nonfinite({"N": good}, lambda: good(x))
    assert found == (2, "the output of N 1.0 (Linear)")
    good = net()
    found = first_nonfinite({"N": good}, lambda: (good(x) * 0).sqrt().sum().backward())
    assert (
        found is not None and found[1] == "the gradient that arrives at N 1.1 (Tanh)"
    )  # sqrt at 0


# ---- figures


def test_diversity_is_the_variance_within_a_class():
    labels = torch.tensor([0, 0, 1, 1, 2])
    images = torch.zeros(5, 3, 16, 16)
    images[2:4] += 5  # between classes: not counted
    assert diversity(images, labels) == 0
    images[1] += 2  # of 0 and 2: 2; of the other class 0; one image says nothing
    assert diversity(images, labels) == pytest.approx(1)
    assert diversity(images[:2], None) == pytest.approx(2)
    assert diversity(images[4:], labels[4:]) != diversity(images[4:], labels[4:])  # NaN
    noise = torch.randn(100, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert diversity(noise, None) == pytest.approx(1 / 16, rel=0.1)  # of 4x4 pixels' mean


def test_checkerboard_is_the_finest_frequency():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = (1.0 - 2 * ((rows + columns) % 2)).view(1, 1, 8, 8)
    assert checkerboard(board) == pytest.approx(4 * 63 / 64)
    assert checkerboard((columns / 8.0).view(1, 1, 8, 8)) == pytest.approx(0, abs=1e-12)
    assert checkerboard(torch.ones(1, 3, 8, 8)) == 0
    scaled = checkerboard(board + columns * 5.0)
    assert checkerboard(board * 0.1 + columns / 2.0) == pytest.approx(scaled) and scaled < 0.1


def test_polarity():
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert polarity(x, x * 0.3 + 2) == pytest.approx(1)
    assert polarity(x, -x) == pytest.approx(-1)
    assert polarity(x, torch.zeros_like(x)) == 0
    assert abs(polarity(x, x.flip(0))) < 0.3


def test_faults_are_found_on_one_side_of_the_threshold():
    shares = {"balance/D_A_real_right": 0.9, "balance/D_A_fake_right": 1.0}
    assert not any(balance_faults(shares | {"balance/gradient_G": 1.0}).values())
    sure = {key: 1.0 for key in shares}
    weak = {"balance/D_B_real_right": 0.3, "balance/D_B_fake_right": 0.6}
    faults = balance_faults(shares | sure | weak | {"balance/gradient_G": 0.0})
    assert all(faults.values()) and "D_A judges 100.0%" in faults["discriminator_wins"]
    assert "D_B judges 30.0% of real and 60.0%" in faults["discriminator_loses"]
    # A discriminator of pairs may be right about all of them.
    assert not any(balance_faults({"balance/D_pairs_right": 1.0}).values())
    faults = balance_faults({"balance/D_pairs_right": 0.3})
    assert "D has 30.0% of the pairs" in faults["discriminator_loses"]
    assert not any(sample_faults({"probe/diversity": 0.5, "probe/polarity_AtoB": 0.0}).values())
    faults = sample_faults({"probe/diversity_AtoB": 0.9, "probe/diversity_BtoA": 0.01})
    assert list(faults) == ["mode_collapse"] and "samples BtoA vary 0.01" in faults["mode_collapse"]


class Monitor:
    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []

    def text(self, *values) -> None:
        self.texts.append(values)


def test_a_fault_is_reported_once_it_has_lasted(capsys):
    watch, monitor = Watch(), Monitor()

    def report(step: int, text: str) -> float:
        return watch.report(step, {"fault": text}, monitor)["health/fault"]

    assert [report(s, "bad") for s in (0, 50, 99)] == [0, 0, 0]
    assert report(99, "") == 0  # it was gone
    assert [report(s, "bad") for s in (100, 150, 200, 300)] == [0, 0, 1, 1]
    state = json.loads(json.dumps(watch.state_dict()))
    watch = Watch()
    watch.load_state_dict(state)
    assert report(400, "bad") == 1 and len(monitor.texts) == 1  # not said again after a resume
    assert report(500, "") == 0 and [report(s, "bad") for s in (600, 700)] == [0, 1]
    assert monitor.texts == [("health/fault", "bad", 200), ("health/fault", "bad", 700)]
    assert capsys.readouterr().out == "warning: step 200: bad\nwarning: step 700: bad\n"
