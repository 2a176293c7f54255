"""The published formulas, by hand; the image pool: what it keeps, returns and saves."""

import math

import pytest
import torch
from torch import Tensor

from gannorm.losses import ImagePool, discriminator_loss, generator_loss

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
