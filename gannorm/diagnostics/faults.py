"""Early warnings: what goes wrong with GANs, measured while training, and named.

Every threshold was measured: the two default runs stay clear of it, and a run made to fail in
that way crosses it (`tests/test_faults.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gannorm.diagnostics.norm_layers import Gaps, fault, norm_layers

# In brackets: the worst that three seeds of the two default runs showed, 900 and 600 steps.
WINS, LOSES = 0.95, 0.5  # shares that a discriminator judges right (0.72; 0.55)
VANISHING = 1e-3  # norm of the generators' gradient (1.1)
DIVERSITY = 0.1  # variance of samples, of the real images' of the same class (0.50)
INVERTED = -0.3  # correlation of brightness (0.76)
CHECKERBOARD = 3.0  # energy of the finest checkerboard, in real images' plus FLOOR (0.92)
FLOOR = 0.005  # of the variance: below it no checkerboard is seen


@dataclass
class Probe:
    """Generated images (N, C, S, S) and what to hold them against.

    labels, real_labels: (N,), or None where there are no classes.
    like: images (N, C, S, S) that each generated one should be bright and dark with, if any.
    """

    images: Tensor
    real: Tensor
    labels: Tensor | None = None
    real_labels: Tensor | None = None
    like: Tensor | None = None


# ---- figures


def diversity(images: Tensor, labels: Tensor | None) -> float:
    """Variance of a pixel within a class, averaged; NaN where no class has two images.

    Images are shrunk to at most 8x8 first: noise on the pixels is not variety.
    """
    small = nn.functional.adaptive_avg_pool2d(images.float(), min(8, images.shape[-1])).flatten(1)
    if labels is None:
        return float(small.var(0).mean())
    groups = [small[labels == k] for k in labels.unique()]
    variances = [each.var(0).mean() for each in groups if len(each) > 1]
    return float(torch.stack(variances).mean()) if variances else float("nan")


def checkerboard(images: Tensor) -> float:
    """Energy in the finest checkerboard, |a - b - c + d|^2 / 4 of 2x2 pixels, of the variance."""
    x = images.float()
    a, b, c, d = x[..., :-1, :-1], x[..., :-1, 1:], x[..., 1:, :-1], x[..., 1:, 1:]
    return float((a - b - c + d).square().mean() / 4 / x.var((2, 3)).mean().clamp_min(1e-6))


def polarity(images: Tensor, like: Tensor) -> float:
    """Mean correlation of brightness between each image and its `like`, in [-1, 1]."""
    pairs = torch.stack([x.float().mean(1) for x in (images, like)]).flatten(2)  # (2, N, H*W)
    centred = nn.functional.normalize(pairs - pairs.mean(2, keepdim=True), dim=2)
    return float((centred[0] * centred[1]).sum(1).mean())


def measure(probes: Mapping[str, Probe]) -> dict[str, float]:
    """What the warnings about samples are judged by, for each probe by name ("" or "_AtoB")."""
    figures = {}
    for name, probe in probes.items():
        real = diversity(probe.real, probe.real_labels)
        figures[f"probe/diversity{name}"] = diversity(probe.images, probe.labels) / max(real, 1e-6)
        figures[f"probe/checkerboard{name}"] = checkerboard(probe.images) / (
            checkerboard(probe.real) + FLOOR
        )
        if probe.like is not None:
            figures[f"probe/polarity{name}"] = polarity(probe.images, probe.like)
    return {k: v for k, v in figures.items() if v == v}


# ---- faults: by name, a warning or nothing


def balance_faults(figures: Mapping[str, float]) -> dict[str, str]:
    """Faults in the figures of the losses (`balance/...`).

    A discriminator of pairs may have all of them in order while the generator learns: that it wins
    outright shows in the generator's gradient alone.
    """
    faults = {"discriminator_wins": "", "discriminator_loses": "", "vanishing_gradient": ""}
    for key, real in figures.items():
        name, _, side = key.removeprefix("balance/").removesuffix("_right").rpartition("_")
        if not key.endswith("_right") or side == "fake":
            continue
        fake = figures.get(f"balance/{name}_fake_right", real)
        said = f"{name} judges {real:.1%} of real and {fake:.1%} of generated images right"
        if side == "pairs":
            said = f"{name} has {real:.1%} of the pairs of real and generated images in order"
        elif min(real, fake) > WINS:
            faults["discriminator_wins"] = (
                f"the discriminator wins outright ({said}): lower optim.lr_d, or set loss.r1, "
                "loss.diffaugment"
            )
        if (real + fake) / 2 < LOSES:
            faults["discriminator_loses"] = (
                f"the discriminator loses outright ({said}): raise optim.lr_d or optim.d_steps"
            )
    gradient = figures.get("balance/gradient_G", 1.0)
    if gradient < VANISHING:
        faults["vanishing_gradient"] = (
            f"the generator's gradient vanishes (norm {gradient:.1e}): its output is saturated or "
            "the discriminator is flat; lower the learning rates, or take another loss="
        )
    return faults


def sample_faults(figures: Mapping[str, float]) -> dict[str, str]:
    """Faults in the figures of `measure`."""
    faults: dict[str, str] = {}
    for key, value in figures.items():
        kind, _, direction = key.removeprefix("probe/").partition("_")
        where = f" {direction}" if direction else ""
        name, wrong, text = {
            "diversity": (
                "mode_collapse",
                value < DIVERSITY,
                f"mode collapse: samples{where} vary {value:.2f} times as much as real images of "
                "their class; lower optim.lr_d, or set loss.diffaugment, loss.r1",
            ),
            "checkerboard": (
                "checkerboard",
                value > CHECKERBOARD,
                f"checkerboard: samples{where} have {value:.1f} times the finest checkerboard of "
                "real images; train longer, or lower optim.lr_g",
            ),
            "polarity": (
                "colour_inversion",
                value < INVERTED,
                f"colour inversion: translations{where} are bright where they should be dark "
                f"(correlation {value:.2f}); start anew with another seed=, or set "
                "model.identity_weight",
            ),
        }[kind]
        faults[name] = faults.get(name) or (text if wrong else "")
    return faults


def norm_faults(networks: Mapping[str, nn.Module], gaps: Gaps) -> dict[str, str]:
    """Norms that collapsed: dead or exploding weights, running statistics far from the batch's."""
    failing = []
    for net, module in networks.items():
        for name, layer in norm_layers(module).items():
            full = f"{net}.{name}"
            wrong = fault(layer, None, gaps.get(full))
            if wrong:
                failing.append(f"{full}: {wrong}")
    more = f" (and {len(failing) - 1} more)" if len(failing) > 1 else ""
    return {"norms": f"a norm fails: {failing[0]}{more}" if failing else ""}
