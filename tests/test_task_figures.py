"""The tasks' figures, of generators that are perfect, idle or wrong in a known way."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from gannorm.config import typed
from gannorm.data import build_data, fetch_all
from gannorm.metrics.similarity import HIGHEST
from gannorm.tasks import TASKS, build_task
from gannorm.tasks.class_conditional_evaluator import mixed, slerp

CONF = Path(__file__).parents[1] / "conf"
CPU = torch.device("cpu")
SMALL = {
    "cyclegan": ["model.width=2", "model.blocks=1", "model.d_width=2"],
    "resblock_gan": ["model.g_widths=[4,4,4,4]", "model.d_widths=[4]", "model.d_downsamplings=1"],
}


def prepared(model: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = typed(compose("config", [f"model={model}", *SMALL[model], *overrides]))
    data = build_data(cfg.data)
    return TASKS[model].evaluator(build_task(cfg, CPU, data.num_classes), data), data


class Lookup(nn.Module):
    """Each image of one set becomes the image of another set at the same place."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.target[torch.cdist(images.flatten(1), self.source.flatten(1)).argmin(1)]


@pytest.fixture(scope="module")
def translation():
    return prepared("cyclegan")


def test_a_perfect_translation_measures_as_the_real_images(translation):
    evaluator, data = translation
    a, b = (fetch_all(source)["image"] for source in data.test)
    found = evaluator.measure({"G_A": Lookup(a, b), "G_B": Lookup(b, a)}, brief=False).figures
    reference = evaluator.reference_figures()
    for way in ("AtoB", "BtoA"):
        assert found[f"psnr_{way}"] == HIGHEST and found[f"feature_distance_{way}"] < 1e-9
        assert found[f"ssim_{way}"] == pytest.approx(1)
        for name in ("fid", "kid", "precision", "coverage", "accuracy"):
            assert found[f"{name}_{way}"] == pytest.approx(
                reference[f"{name}_{way}_real"], rel=1e-3, abs=1e-6
            )
    for end in "AB":
        assert found[f"cycle_l1_{end}"] == 0 and found[f"cycle_psnr_{end}"] == HIGHEST


def test_no_translation_measures_as_untranslated(translation):
    evaluator, _ = translation
    found = evaluator.measure({"G_A": nn.Identity(), "G_B": nn.Identity()}, brief=False).figures
    reference = evaluator.reference_figures()
    untranslated = {k for k in reference if k.endswith("_untranslated")}
    assert len(untranslated) == 22  # two ways, 8 figures of sets and 3 of pairs
    for name in untranslated:
        assert found[name.removesuffix("_untranslated")] == pytest.approx(reference[name], rel=1e-6)
    for way in ("AtoB", "BtoA"):
        assert reference[f"fid_{way}_untranslated"] > 5 * reference[f"fid_{way}_real"]
        assert reference[f"accuracy_{way}_untranslated"] < reference[f"accuracy_{way}_real"] - 0.3
    assert found["cycle_l1_A"] == 0


def test_each_way_back_has_its_own_error(translation):
    """A generator of A that destroys its images: what comes back of both domains is wrong, and
    only the translations to A."""
    evaluator, data = translation
    a, b = (fetch_all(source)["image"] for source in data.test)

    class Grey(nn.Module):
        def forward(self, images):
            return torch.zeros_like(images)

    found = evaluator.measure({"G_A": Lookup(a, b), "G_B": Grey()}, brief=False).figures
    assert found["cycle_l1_A"] == pytest.approx(float(a.abs().mean()), rel=1e-5)
    assert found["psnr_AtoB"] == HIGHEST and found["psnr_BtoA"] < 10
    assert found["accuracy_AtoB"] > 0.9 and found["accuracy_BtoA"] < 0.2
    assert found["fid_BtoA"] > 10 * found["fid_AtoB"]
    brief = evaluator.measure({"G_A": Lookup(a, b), "G_B": Grey()}, brief=True).figures
    assert brief == {k: v for k, v in found.items() if "cycle" not in k}


def test_the_protocol_says_how_many_were_translated(translation):
    evaluator, _ = translation
    for samples, expected in ((None, 360), (50, 50), (1000, 360)):
        evaluator.cfg.metrics.samples = samples
        found = evaluator.protocol()
        evaluator.cfg.metrics.samples = None
        assert [found[domain]["generated"] for domain in "AB"] == [expected, expected]
        assert found["A"]["floor"] == "360 held-out images" and found["data"] == "digits_m"


def test_batches_of_a_domain_renew_its_generators_statistics():
    evaluator, data = prepared("cyclegan", "norm=batch", "metrics.standing_batches=3")
    seen: dict[str, list] = {"G_A": [], "G_B": []}

    class Recorder(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            seen[self.name].append(x)

    for name, domain in (("G_A", 0), ("G_B", 1)):
        for forward in evaluator.standing_forwards(name, Recorder(name), 3):
            forward()
        images = torch.cat(seen[name])
        assert images.shape == (24, 3, 32, 32)
        labels = evaluator.references[domain].reader(images)[1].softmax(1).amax(1)
        assert labels.mean() > 0.8  # images of the domain, which its classifier reads with ease
    assert not torch.equal(seen["G_A"][0], seen["G_B"][0])


# ---- class-conditional


@pytest.fixture(scope="module")
def generation():
    return prepared("resblock_gan")


class Gallery(nn.Module):
    """A generator that shows held-out digits of the class asked for."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, shift: int = 0) -> None:
        super().__init__()
        self.by_class = [images[labels == k] for k in range(10)]
        self.shift, self.shown = shift, [0] * 10

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = []
        for k in labels.tolist():
            k = (k + self.shift) % 10
            out.append(self.by_class[k][self.shown[k] % len(self.by_class[k])])
            self.shown[k] += 1
        return torch.stack(out)


def test_real_images_measure_as_real_ones(generation):
    evaluator, data = generation
    batch = fetch_all(data.test[0])
    found = evaluator.measure({"G": Gallery(batch["image"], batch["label"])}, brief=False).figures
    real = evaluator.reference_figures()
    assert set(real) == {f"{name}_real" for name in found}
    assert found["accuracy"] > 0.95 and found["coverage"] > real["coverage_real"] - 0.05
    assert found["fid"] < 1.5 * real["fid_real"]
    assert found["class_fid"] < 1.5 * real["class_fid_real"]

    other = evaluator.measure(
        {"G": Gallery(batch["image"], batch["label"], shift=1)}, False
    ).figures
    assert other["accuracy"] < 0.05 and other["class_fid"] > 5 * found["class_fid"]
    assert other["fid"] == pytest.approx(found["fid"], rel=0.2)


def test_evaluation_is_of_copies(generation):
    evaluator, _ = generation
    task = evaluator.task
    before = {k: v.clone() for k, v in task.generators["G"].state_dict().items()}
    assert task.generators["G"].training
    first = evaluator.evaluate(task.generators).figures
    assert evaluator.evaluate(task.generators).figures == first  # the same noise
    assert task.generators["G"].training
    assert all(torch.equal(v, before[k]) for k, v in task.generators["G"].state_dict().items())


def test_between_two_noises_length_is_kept():
    start, end = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0])
    path = slerp(start, end, torch.tensor([0, 0.5, 1]))
    torch.testing.assert_close(path[[0, 2]], torch.stack([start, end]))
    torch.testing.assert_close(path[1], (start + end) / 2**0.5)
    one = slerp(torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([0, 0.5, 1]))
    assert one.flatten().tolist() == [2, 0.5, -1]  # where there is no circle


@pytest.mark.parametrize("norm", ["conditional_batch", "conditional_instance", "group"])
def test_mixed_classes(norm):
    """A mixture of one class alone is that class; others lie between. The original stays."""
    evaluator, _ = prepared("resblock_gan", f"norm={norm}", "model.g_spectral_norm=true")
    task = evaluator.task
    net = task.generators["G"].eval()
    for name, parameter in net.named_parameters():
        if parameter.shape[0] == 10 and "conv" not in name:
            torch.nn.init.normal_(parameter)
    noise, three = torch.randn(3, task.model.z_dim), torch.tensor([3, 3, 3])
    mix = torch.eye(10)[[3, 7, 3]]
    mix[2] = (mix[0] + mix[1]) / 2
    with torch.no_grad():
        expected = net(noise, three)
        found = mixed(net, mix)(noise, torch.arange(3))
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], net(noise, three + 4)[1])
        assert not torch.allclose(found[2], expected[2]) and found.isfinite().all()
        assert torch.equal(net(noise, three), expected)
