"""Steps of both tasks under every loss: finite, everything moves, in every precision."""

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from gannorm.config import typed
from gannorm.data import Batch
from gannorm.tasks import CycleGAN, Task, build_task
from gannorm.tasks.losses import discriminator_loss, generator_loss

CONF = Path(__file__).parents[1] / "conf"
LOSSES = sorted(p.stem for p in (CONF / "loss").glob("*.yaml"))
SIZES = {
    "cyclegan": [
        "data.image_size=8", "model.width=4", "model.blocks=1", "model.d_width=4",
        "model.downsamplings=1", "model.d_layers=1",
    ],
    "resblock_gan": [
        "model=resblock_gan", "data.image_size=8", "model.g_widths=[8,8]", "model.d_widths=[8]",
        "model.d_downsamplings=1", "model.z_dim=4",
    ],
}  # fmt: skip


def build(model: str, *overrides: str) -> Task:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("config", [*SIZES[model], "data.batch_size=4", *overrides])
    torch.manual_seed(0)
    task = build_task(typed(raw), torch.device("cpu"), None if model == "cyclegan" else 10)
    task.set_learning_rates(0)
    return task


def data(task: Task) -> list[list[Batch]]:
    """What one step takes: images of noise."""

    def batch() -> Batch:
        return {"image": torch.rand(4, 3, 8, 8) * 2 - 1, "label": torch.arange(4)}

    domains = 2 if isinstance(task, CycleGAN) else 1
    return [[batch() for _ in range(domains)] for _ in range(task.batches_per_step)]


def parameters(task: Task) -> dict[str, torch.Tensor]:
    return {
        f"{net} {name}": p.detach().clone()
        for net, network in task.networks.items()
        for name, p in network.named_parameters()
        if p.requires_grad
    }


def train_and_check(task: Task, steps: int = 3) -> dict[str, float]:
    """The last step's figures; every parameter has moved and is finite."""
    before = parameters(task)
    for _ in range(steps):
        figures = {k: float(v) for k, v in task.train_step(data(task)).items()}
    after = parameters(task)
    still = [name for name in before if torch.equal(before[name], after[name])]
    # Where real and fake pull alike, a constant on all logits has no derivative.
    assert {name.partition(" ")[2] for name in still} <= {"linear.bias", "model.5.bias"}
    assert all(p.isfinite().all() for p in after.values())
    return figures


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_both_models(model: str, loss: str):
    task = build(model, f"loss={loss}")
    figures = train_and_check(task)
    assert all(math.isfinite(v) for v in figures.values())
    penalized = loss in ("rpgan", "wgan_gp")
    for name in task.discriminators:
        side = "pairs" if penalized else "fake"
        assert {name, f"{name}_real", f"balance/{name}_{side}_right"} <= figures.keys()
        assert (f"{name}_penalty" in figures) == penalized
        assert not penalized or figures[f"{name}_penalty"] > 0


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("loss", ["rpgan", "wgan_gp", "nonsaturating"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(model: str, loss: str, precision: str):
    """Close to float32 at the first step, and the penalty is not made of halves."""
    extra = ["optim.clip_norm=1", f"loss={loss}"]
    half = build(model, *extra, f"trainer.precision={precision}")
    full = build(model, *extra)
    if precision == "fp16":  # the first steps are not skipped to find the scale
        half.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for task in (half, full):
        torch.manual_seed(1)
        task.first = task.train_step(data(task))
    keys = [k for k in full.first if "_penalty" in k or k in full.discriminators]
    for key in keys:
        a, b = float(half.first[key]), float(full.first[key])
        assert a != b or "penalty" in key
        assert a == pytest.approx(b, rel=0.05, abs=0.02)
        assert half.first[key].dtype == torch.float32
    train_and_check(half)


def test_the_average_is_of_the_latest_tenth_at_most():
    task = build("resblock_gan", "optim.ema_decay=0.99", "optim.ema_start=5")
    weight, mean = (net["G"].conv.bias for net in (task.generators, task.averaged))
    lags = []
    for step in range(2000):
        with torch.no_grad():
            weight.fill_(step)
        task.update_averages(step)
        lags.append(step - float(mean[0]))
    assert lags[:6] == [0] * 6
    assert lags[205] == pytest.approx(200 / 11, rel=0.1)
    assert lags[-1] == pytest.approx(99, rel=0.01)  # decay / (1 - decay)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("weight", ["r1=1.0", "r2=1.0", "gradient_penalty=1.0"])
@pytest.mark.parametrize("loss", ["lsgan", "hinge"])
def test_a_penalty_works_with_any_loss(model: str, loss: str, weight: str):
    train_and_check(build(model, f"loss={loss}", f"loss.{weight}"), 2)


def test_r1_flattens_the_discriminator():
    """Under a large weight its gradient at real images falls below what it is without one."""
    slopes = {}
    for r1 in (0.0, 100.0):
        extra = ["model.d_spectral_norm=false", "optim.lr_d=0.01"]
        task = build("resblock_gan", f"loss.r1={r1}", *extra)
        for _ in range(20):
            task.train_step(data(task))
        ((batch,),) = data(task)
        x = batch["image"].requires_grad_()
        task.discriminators["D"](x, batch["label"]).sum().backward()
        slopes[r1] = float(x.grad.flatten(1).norm(dim=1).mean())
    assert slopes[100.0] < 0.5 * slopes[0.0]


def test_relativistic_pairs_have_one_class():
    """The generator's loss is that of its images and the batch's own, of the same labels."""
    task = build("resblock_gan", "loss=rpgan", "optim.lr_d=1e-12")
    net, seen = task.discriminators["D"], []
    net.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output.detach())))
    ((batch,),) = data(task)
    figures = task.train_step([[batch]])
    (images, labels, real_logits), (_, again, fake_logits) = seen[-2:]  # of the generator's step
    assert torch.equal(labels, batch["label"]) and torch.equal(again, labels)
    assert torch.equal(images, batch["image"])
    assert figures["G"] == generator_loss(fake_logits, "relativistic", real_logits)


def test_both_translations_are_told_apart_by_their_own_domain():
    task = build("cyclegan", "loss=rpgan", "loss.r1=0", "loss.r2=0", "model.pool_size=0")
    ((a, b),) = data(task)
    seen = {name: [] for name in task.discriminators}
    for name, net in task.discriminators.items():
        net.register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append((*inputs, output.detach()))
        )
    figures = task.train_step([[a, b]])
    for name, real in (("D_A", b), ("D_B", a)):
        (fake, fake_logits), (shown, real_logits), (both, logits) = seen[name]
        assert torch.equal(shown, real["image"])
        assert torch.equal(both, torch.cat([shown, fake]))
        one, two = logits.chunk(2)
        assert figures[name] == discriminator_loss(one, two, "relativistic")
        expected = generator_loss(fake_logits, "relativistic", real_logits)
        assert figures[f"G_{name[-1]}"] == expected


@pytest.mark.parametrize("model", SIZES)
def test_discriminator_steps(model: str):
    """optim.d_steps=3: three steps on three batches to one of the generators."""
    task = build(model, "optim.d_steps=3")
    steps = {"G": 0, "D": 0}
    for name, optimizer in task.optimizers.items():
        optimizer.register_step_post_hook(
            lambda *_, name=name: steps.__setitem__(name, steps[name] + 1)
        )
    real = []
    net = task.discriminators["D" if model == "resblock_gan" else "D_A"]
    net.register_forward_pre_hook(lambda _, inputs: real.append(inputs[0]))
    batches = data(task)
    assert len(batches) == 3
    task.train_step(batches)
    assert steps == {"G": 1, "D": 3}
    for each in batches:
        image = each[-1]["image"]
        assert any(torch.equal(image, x[:4]) for x in real)


@pytest.mark.parametrize("model", SIZES)
def test_augmentation_is_what_the_discriminator_sees(model: str):
    """Real and generated images, in its own step and in the generator's."""
    seen = {}
    for policy in ("[]", "[cutout]"):
        task = build(model, f"loss.diffaugment={policy}")
        seen[policy] = []
        for net in task.discriminators.values():
            net.register_forward_pre_hook(
                lambda _, inputs, into=seen[policy]: into.append(inputs[0].detach())
            )
        task.train_step(data(task))
    assert len(seen["[]"]) == len(seen["[cutout]"]) >= 2
    for plain, cut in zip(seen["[]"], seen["[cutout]"], strict=True):
        assert (cut == 0).flatten(1).any(1).all() and not (plain == 0).any()
    train_and_check(build(model, "loss.diffaugment=[color,translation,cutout]"))


@pytest.mark.parametrize("model", SIZES)
def test_spectral_norm_is_a_config(model: str):
    for wanted in (True, False):
        task = build(model, f"model.d_spectral_norm={str(wanted).lower()}")
        for net in task.discriminators.values():
            convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
            for module in convolutions:
                assert torch.nn.utils.parametrize.is_parametrized(module) == wanted
                if wanted:
                    net(*[torch.rand(2, 3, 8, 8), torch.arange(2)][: 1 + (len(task.networks) == 2)])
                    size = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)
                    assert 0.5 < float(size) < 2
        train_and_check(task)


@pytest.mark.parametrize("model", SIZES)
def test_a_gradient_that_is_not_finite_moves_nothing(model: str):
    task = build(model)
    task.train_step(data(task))
    before, state = parameters(task), task.optimizers["D"].state_dict()
    steps = [int(s["step"]) for s in state["state"].values()]
    batches = data(task)
    for each in batches:
        for batch in each:
            batch["image"][0, 0, 0, 0] = float("nan")
    figures = task.train_step(batches)
    assert not figures["balance/gradient_D"].isfinite()
    after = parameters(task)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("D"))
    state = task.optimizers["D"].state_dict()["state"].values()
    assert [int(s["step"]) for s in state] == steps
    train_and_check(task, 1)  # and training can go on


def test_gradient_norms_are_those_of_all_parameters():
    task = build("cyclegan")
    figures = task.train_step(data(task))
    for name, nets in (("G", task.generators), ("D", task.discriminators)):
        gradients = [
            p.grad.flatten()
            for net in nets.values() for p in net.parameters() if p.requires_grad
        ]  # fmt: skip
        expected = float(torch.cat(gradients).norm())
        assert float(figures[f"balance/gradient_{name}"]) == pytest.approx(expected, rel=1e-5)
