"""The published formulas, by hand; the image pool: what it keeps, returns and saves."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gannorm.schema import LossConfig
from gannorm.tasks.losses import (
    LOSSES,
    ImagePool,
    discriminator_accuracy,
    discriminator_loss,
    discriminator_objective,
    generator_loss,
)

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0, 0.0]), torch.tensor([-3.0, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    "kind,discriminator,generator",
    [
        # 0.5 * ((1 + 0.25 + 4 + 1) / 4 + (9 + 0 + 0.25 + 1) / 4); (16 + 1 + 0.25 + 0) / 4
        ("lsgan", 2.0625, 4.3125),
        # (0 + 0.5 + 2 + 1) / 4 + (0 + 1 + 1.5 + 2) / 4; -(-3 + 0 + 0.5 + 1) / 4
        ("hinge", 2.0, 0.375),
    ],
)
def test_by_hand(kind, discriminator, generator):
    assert float(discriminator_loss(REAL, FAKE, kind)) == discriminator
    assert float(generator_loss(FAKE, kind)) == generator
    patches = [t.view(1, 1, 2, 2) for t in (REAL, FAKE)]  # a mean over all logits of a map
    assert float(discriminator_loss(*patches, kind)) == discriminator
    half = discriminator_loss(REAL.bfloat16(), FAKE.bfloat16(), kind)
    assert half.dtype == torch.float32 and float(half) == discriminator


def test_what_each_side_wants():
    """Where the losses vanish, and where the hinge stops pulling."""
    one, zero = torch.ones(4), torch.zeros(4)
    assert discriminator_loss(one, zero, "lsgan") == generator_loss(one, "lsgan") == 0
    assert discriminator_loss(one, -one, "hinge") == 0
    real, fake = torch.tensor([1.5, 0.5]).requires_grad_(), torch.tensor([-1.5, -0.5])
    fake.requires_grad_()
    discriminator_loss(real, fake, "hinge").backward()
    assert real.grad.tolist() == [0, -0.5] and fake.grad.tolist() == [0, 0.5]


@pytest.mark.parametrize("kind", ["lsgan", "hinge"])
def test_gradients_pull_apart(kind):
    """Descent raises real and lowers fake logits; the generator raises the fake ones."""
    real, fake = torch.full((4,), 0.3, requires_grad=True), torch.full((4,), 0.3).requires_grad_()
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def formula(kind: str, real, fake):
    """(D's loss, dD/dreal, dD/dfake, G's loss, dG/dfake) of four logits each, written out."""
    if kind == "nonsaturating":
        return (
            -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(),
            -sigmoid(-real) / 4, sigmoid(fake) / 4,
            -np.log(sigmoid(fake)).mean(), -sigmoid(-fake) / 4,
        )  # fmt: skip
    if kind == "wgan":
        one = np.full(4, 0.25)
        return fake.mean() - real.mean(), -one, one, -fake.mean(), -one
    lead = real - fake
    return (
        np.log(1 + np.exp(-lead)).mean(), -sigmoid(-lead) / 4, sigmoid(-lead) / 4,
        np.log(1 + np.exp(lead)).mean(), -sigmoid(lead) / 4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["nonsaturating", "wgan", "relativistic"])
def test_losses_and_their_gradients_are_the_formulas(kind: str):
    d, d_real, d_fake, g, g_fake = formula(kind, REAL.double().numpy(), FAKE.double().numpy())
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss = discriminator_loss(real, fake, kind)
    loss.backward()
    assert loss.item() == pytest.approx(d, rel=1e-6)
    np.testing.assert_allclose(real.grad, d_real, rtol=1e-5)
    np.testing.assert_allclose(fake.grad, d_fake, rtol=1e-5)
    fake.grad = None
    loss = generator_loss(fake, kind, REAL)
    loss.backward()
    assert loss.item() == pytest.approx(g, rel=1e-6)
    np.testing.assert_allclose(fake.grad, g_fake, rtol=1e-5)
    half = discriminator_loss(REAL.bfloat16(), FAKE.bfloat16(), kind)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(d, rel=1e-6)


@pytest.mark.parametrize("kind", ["nonsaturating", "relativistic"])
def test_confident_logits_do_not_overflow(kind: str):
    sure = torch.tensor([1e4])
    for real, fake in ((sure, -sure), (-sure, sure)):
        assert discriminator_loss(real, fake, kind).isfinite()
        assert generator_loss(fake, kind, real).isfinite()


def test_an_unknown_loss_is_an_error():
    for loss in (
        lambda: generator_loss(FAKE, "wgan_gp"),
        lambda: discriminator_loss(REAL, FAKE, ""),
    ):
        with pytest.raises(KeyError):
            loss()


def test_discriminator_accuracy():
    shares = {kind: discriminator_accuracy(REAL, FAKE, kind) for kind in LOSSES}
    assert shares["lsgan"] == {"real": 0.25, "fake": 0.5}  # of 2, 0.5, -1, 0; of -3, 0, 0.5, 1
    assert shares["hinge"] == {"real": 0.5, "fake": 0.25}
    assert shares["wgan"] == {"pairs": 0.5}
    assert shares["nonsaturating"] == shares["hinge"] and shares["relativistic"] == shares["wgan"]


# ---- penalties, on D(x) = x'Ax / 2 + b'x, whose gradient at x is Ax + b


def settings(**weights) -> LossConfig:
    zero = {"r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0, "diffaugment": []}
    return LossConfig(**{"gan": "wgan", **zero, **weights})


class Quadratic:
    def __init__(self, patches: int) -> None:
        generator = torch.Generator().manual_seed(0)
        a, self.b = torch.randn(12, 12, generator=generator), torch.randn(12, generator=generator)
        self.a, self.patches = (a + a.T) / 2, patches
        self.a.requires_grad_(), self.b.requires_grad_()
        self.real, self.fake = (torch.randn(5, 3, 2, 2, generator=generator) for _ in range(2))

    def judge(self, *images: Tensor) -> list[Tensor]:
        flat = [x.flatten(1) for x in images]
        logits = [((x @ self.a) * x).sum(1) / 2 + x @ self.b for x in flat]
        if self.patches == 1:
            return logits
        spread = torch.linspace(-1, 1, self.patches)  # patches differ, their mean does not
        return [z.view(-1, 1, 1, 1) + spread.view(1, 1, 1, -1) for z in logits]

    def slopes(self, images: Tensor) -> np.ndarray:
        x, a, b = (t.detach().double().numpy() for t in (images.flatten(1), self.a, self.b))
        return x @ a + b


@pytest.mark.parametrize("patches", [1, 6])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("r1,r2", [(3.0, 0.0), (0.0, 5.0), (3.0, 5.0)])
def test_r1_and_r2_are_the_formulas(kind, r1, r2, patches):
    """r1/2 * mean |Ax + b|^2, whose derivative by b is r1 * mean(Ax + b)."""
    d = Quadratic(patches)
    cfg = settings(r1=r1, r2=r2, gan=kind)
    loss, penalty, logits = discriminator_objective(d.judge, d.real, d.fake, cfg)
    real, fake = d.slopes(d.real), d.slopes(d.fake)
    expected = r1 / 2 * (real**2).sum(1).mean() + r2 / 2 * (fake**2).sum(1).mean()
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    (slope,) = torch.autograd.grad(penalty, d.b, retain_graph=True)
    np.testing.assert_allclose(slope, r1 * real.mean(0) + r2 * fake.mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(loss, discriminator_loss(*d.judge(d.real, d.fake), kind))
    assert torch.equal(logits[0], d.judge(d.real)[0])
    assert not d.real.requires_grad and not d.fake.requires_grad  # the caller's are left alone


@pytest.mark.parametrize("patches", [1, 6])
def test_the_gradient_penalty_is_the_formula(patches: int):
    """10 * mean (|g| - 1)^2 for g = Ax + b; by b: 10 * mean 2 (|g| - 1) g / |g|."""
    d = Quadratic(patches)
    torch.manual_seed(7)
    _, penalty, _ = discriminator_objective(
        d.judge, d.real, d.fake, settings(gradient_penalty=10.0)
    )
    torch.manual_seed(7)
    share = torch.rand(5, 1, 1, 1)
    assert len(share.unique()) == 5  # one point for each pair
    g = d.slopes(share * d.real + (1 - share) * d.fake)
    size = np.sqrt((g**2).sum(1, keepdims=True))
    assert float(penalty.detach()) == pytest.approx(10 * ((size - 1) ** 2).mean(), rel=1e-5)
    penalty.backward()
    expected = 10 * (2 * (size - 1) * g / size).mean(0)
    np.testing.assert_allclose(d.b.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_flat_critic_has_finite_derivatives():
    d = Quadratic(1)
    with torch.no_grad():
        d.a.zero_(), d.b.zero_()
    _, penalty, _ = discriminator_objective(d.judge, d.real, d.fake, settings(gradient_penalty=1.0))
    penalty.backward()
    assert penalty == 1 and d.b.grad.isfinite().all() and d.a.grad.isfinite().all()


def test_penalties_of_half_precision_images_are_float32():
    d = Quadratic(1)
    cfg = settings(r1=1.0, r2=1.0)
    _, penalty, _ = discriminator_objective(d.judge, d.real.bfloat16(), d.fake.half(), cfg)
    exact = discriminator_objective(d.judge, d.real, d.fake, cfg)[1].item()
    assert penalty.dtype == torch.float32 and penalty.item() == pytest.approx(exact, rel=0.02)


def stamped(numbers) -> Tensor:
    """Images (N, 1, 2, 2) that show their number."""
    return torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def stamps(images: Tensor) -> list[int]:
    assert (images == images[:, :, :1, :1]).all()  # no image is a mixture
    return images[:, 0, 0, 0].int().tolist()


def test_pool_of_none_passes_through():
    pool, x = ImagePool(0), stamped(range(5))
    for _ in range(3):
        assert pool.query(x) is x
    assert pool.state_dict()["images"] is None


def test_pool_fills_first_and_never_outgrows_its_size():
    torch.manual_seed(0)
    pool = ImagePool(5)
    for start in (0, 2):
        assert stamps(pool.query(stamped([start, start + 1]))) == [start, start + 1]
    assert stamps(pool.query(stamped(range(4, 12))))[0] == 4  # the last free place, then swaps
    for start in range(12, 60, 8):
        pool.query(stamped(range(start, start + 8)))
        assert pool.images.shape == (5, 1, 2, 2)
    assert len(set(stamps(pool.images))) == 5


def test_half_of_the_images_are_swapped_for_old_ones():
    """Each old one was kept, leaves the pool, and comes from any place in it."""
    torch.manual_seed(0)
    pool, kept, swaps, ages, number = ImagePool(20), set(range(20)), 0, [], 20
    pool.query(stamped(range(20)))
    for _ in range(250):
        new = list(range(number, number + 4))
        number += 4
        for given, got in zip(new, stamps(pool.query(stamped(new))), strict=True):
            if got != given:
                assert got in kept
                kept = kept - {got} | {given}
                swaps += 1
                ages.append(given - got)
        assert set(stamps(pool.images)) == kept
    assert abs(swaps - 500) < 4 * math.sqrt(250)  # 4 standard deviations
    mean = sum(ages) / len(ages)  # each image meets a swap of its place every 2 * 20 images
    assert 30 < mean < 50


def test_pool_keeps_no_graph_and_no_views():
    torch.manual_seed(0)
    pool = ImagePool(3)
    x = stamped(range(6)).requires_grad_()
    y = pool.query(x * 2)
    assert not y.requires_grad and not pool.images.requires_grad
    assert y.untyped_storage().data_ptr() != pool.images.untyped_storage().data_ptr()
    mine = (x * 2).detach()
    pool = ImagePool(7)
    y = pool.query(mine)
    y.zero_(), mine.zero_()
    assert stamps(pool.images) == [0, 2, 4, 6, 8, 10]


def test_pool_continues_identically(tmp_path):
    """Saved half full and full."""
    for filled in (2, 30):
        torch.manual_seed(0)
        pool = ImagePool(7)
        pool.query(stamped(range(filled)))
        torch.save({"pool": pool.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "p")
        expected = [stamps(pool.query(stamped(range(n, n + 5)))) for n in range(100, 150, 5)]
        state = torch.load(tmp_path / "p")
        torch.set_rng_state(state["rng"])
        again = ImagePool(7)
        again.load_state_dict(state["pool"])
        assert [stamps(again.query(stamped(range(n, n + 5)))) for n in range(100, 150, 5)] == (
            expected
        )


def test_empty_pool_round_trip():
    pool = ImagePool(3)
    pool.load_state_dict(ImagePool(3).state_dict())
    assert stamps(pool.query(stamped([1]))) == [1]


def test_restored_pool_follows_its_images_device():
    """A checkpoint is loaded on the CPU; training goes on where its images are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    for filled in (2, 5):
        pool = ImagePool(5)
        pool.query(stamped(range(filled)))
        assert pool.query(stamped(range(4)).to(device)).device.type == device.type
        assert pool.images.device.type == device.type
