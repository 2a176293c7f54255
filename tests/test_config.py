"""Every choice composes and builds, wrong requests are named, no key is dead."""

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gannorm import config, schema
from gannorm.config import TABLES, typed
from gannorm.data import DATA, build_data
from gannorm.errors import RequestError
from gannorm.models.norm_factory import NORMS
from gannorm.schema import Config, InstanceNormConfig, Section
from gannorm.tasks import TASKS, build_task
from gannorm.training.loop import train
from gannorm.training.request import check_pair

CONF = Path(__file__).parents[1] / "conf"
CHOICES = [f"{p.parent.name}={p.stem}" for p in sorted(CONF.glob("*/*.yaml"))]
SMALL = ["model.d_widths=[8]", "model.d_downsamplings=1"]  # its spectral norms take their time
MODELS = {"cyclegan": [], "resblock_gan": SMALL}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    if OmegaConf.is_missing(cfg.data, "root"):
        cfg.data.root = "/tmp"
    return cfg


def build(raw: DictConfig) -> Config:
    """Check and build as `train` does, without data and memory."""
    cfg = typed(raw)
    check_pair(cfg)
    build_task(cfg, torch.device("meta"), None if cfg.model.name == "cyclegan" else 10)
    return cfg


# ---- choices


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_with_a_model(choice: str):
    group, name = choice.split("=")
    if group in ("model", "experiment"):
        cfg = build(composed(choice))
        assert group == "experiment" or cfg.model.name == name
        return
    refusals = []
    for model, sizes in MODELS.items():
        try:
            cfg = build(composed(f"model={model}", choice, *sizes))
        except RequestError as error:
            refusals.append(str(error))
            continue
        assert getattr(getattr(cfg, group), "name", name) == name
        break
    assert len(refusals) < len(MODELS)
    for line in refusals:  # of the other kind of model: names what works
        assert choice in line and f"choose {group}= " in line


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda p: p.stem)
def test_an_experiment_has_what_it_says_and_the_command_line_wins(path: Path):
    choice, file = f"experiment={path.stem}", OmegaConf.load(path)
    cfg = composed(choice)
    for entry in file.defaults:
        ((group, name),) = entry.items()
        group = group.removeprefix("override /")
        said = OmegaConf.merge(OmegaConf.load(CONF / group / f"{name}.yaml"), file.get(group, {}))
        said.pop("defaults", None)
        assert cfg[group] == said
    assert composed(choice, "norm=group").norm.name == "group"
    assert composed("norm=group", choice, "trainer.steps=3").trainer.steps == 3


def test_the_schema_knows_exactly_the_files():
    for key, table in TABLES.items():
        group, _, field = key.partition(".")
        if field == "name":
            assert {p.stem for p in (CONF / group).glob("*.yaml")} == set(table)


@pytest.mark.parametrize("norm", NORMS)
def test_both_resblocks_take_every_norm(norm: str):
    raw = composed("model=resblock_gan", f"norm={norm}", *SMALL)
    for raw.model.block in ("preact", "postact"):
        build(raw)


def test_a_model_chooses_its_companions():
    default, resblock = composed(), composed("model=resblock_gan")
    assert (default.model.name, default.data.name, default.norm.name, default.loss.gan) == (
        "cyclegan", "digits_m", "instance", "lsgan",
    )  # fmt: skip
    assert (resblock.data.name, resblock.norm.name, resblock.loss.gan) == (
        "digits", "conditional_batch", "relativistic",
    )  # fmt: skip
    for name, cfg in (("cyclegan", default), ("resblock_gan", resblock)):
        for group in ("optim", "trainer"):
            assert cfg[group] == OmegaConf.load(CONF / group / f"{name}.yaml")


@pytest.mark.parametrize("choice", ["norm=group", "data=mnist", "loss=lsgan", "optim=cyclegan"])
def test_the_command_line_wins_over_a_companion(choice: str):
    group, name = choice.split("=")
    before, after = composed(choice, "model=resblock_gan"), composed("model=resblock_gan", choice)
    assert before == after
    file = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert before[group] == file != composed("model=resblock_gan")[group]
    assert composed("trainer.steps=3", "model=resblock_gan").trainer.steps == 3


# ---- wrong requests

BASE = cache(composed)
RESBLOCK_GAN = ("model=resblock_gan",)


def refused(*changes: str, choices: tuple[str, ...] = ()) -> str:
    """The one line with which a config with these keys changed or added is refused."""
    raw = copy.deepcopy(BASE(*choices))
    OmegaConf.set_struct(raw, False)
    raw.merge_with_dotlist(list(changes))
    with pytest.raises(RequestError) as caught:
        build(raw)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("norm.bakend=torch", "norm.backend"),
        ("trainer.stepz=3", "trainer.steps"),
        ("model.widht=3", "model.width"),
        ("data.batchsize=3", "data.batch_size"),
        ("sed=1", "seed"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(typo: str, meant: str):
    assert f"{typo.partition('=')[0]} is not a configuration key (did you mean {meant}?" in refused(
        typo
    )


@pytest.mark.parametrize(
    "change",
    [
        "trainer.steps=many", "trainer.steps=2.5", "trainer.steps=null", "norm.affine=maybe",
        "norm.backend=cuda", "trainer.device=gpu", "trainer.precision=fp8", "loss.gan=gan",
        "seed=x", "metrics.extractor=vgg",
        "metrics.best=beauty", "optim.lr_g=fast", "optim.clip_norm=much", "model.cycle_weight=[1]",
    ],
)  # fmt: skip
def test_a_wrong_type_names_the_key(change: str):
    key, _, value = change.partition("=")
    message = refused(change)
    assert message.startswith(f"{key}: ") and "is not a configuration key" not in message
    assert value[0] == "[" or value.replace("null", "None") in message


@pytest.mark.parametrize("widths", ["3", "[a]", "[8,null]"])
def test_a_wrong_list_names_the_key(widths: str):
    message = refused(f"model.g_widths={widths}", choices=RESBLOCK_GAN)
    assert message.startswith("model.g_widths") and "is not a configuration key" not in message


def test_a_folder_may_be_named_by_a_number():
    assert typed(composed("data=folder_pair", "data.root=2026")).data.root == "2026"


def test_a_wrong_choice_lists_the_right_ones():
    assert "auto, triton, cpu, torch" in refused("norm.backend=cuda")
    assert "digits_m" in refused("data.name=faces") and "instance" in refused("norm.name=foo")


def test_a_missing_value_is_named():
    assert re.match(r"data\.root: .*missing", refused("data.root=???", choices=("data=mnist",)))


@pytest.mark.parametrize("key", ["trainer.steps", "norm.eps", "seed"])
def test_a_removed_key_is_missing_not_unknown(key: str):
    with pytest.raises(RequestError) as caught:
        typed(composed(f"~{key}"))
    assert str(caught.value).startswith(f"{key}: ") and "missing" in str(caught.value).lower()


@pytest.mark.parametrize(
    "change",
    [
        "trainer.steps=0", "trainer.log_every=0", "trainer.eval_every=-1", "optim.lr_g=0.0",
        "trainer.sample_every=0", "trainer.checkpoint_every=0", "trainer.keep_checkpoints=0",
        "optim.lr_d=-1.0", "optim.lr_g=nan", "optim.lr_d=inf", "optim.beta1=1.0", "optim.beta2=1.5",
        "optim.ema_decay=2.0", "optim.ema_start=-1", "optim.decay_from=1.1", "optim.d_steps=0",
        "optim.clip_norm=0.0", "seed=-1", "seed=4294967296", "trainer.steps=True",
        "data.batch_size=0", "data.image_size=0", "data.num_workers=-1",
        "data.channels=2", "model.width=0", "model.d_width=0", "model.blocks=-1",
        "metrics.samples=0", "metrics.standing_batches=-1", "metrics.patience=0",
        "loss.r1=-1.0", "loss.r2=nan", "loss.gradient_penalty=-1.0",
        "model.pool_size=-1", "model.cycle_weight=-1.0", "norm.eps=-1.0", "norm.eps=nan",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(change: str):
    message = refused(change)
    assert message.startswith(change) and " must " in message


@pytest.mark.parametrize(
    ("choice", "change"),
    [
        ("norm=group", "norm.num_groups=0"),
        ("norm=batch", "norm.momentum=1.5"),
        ("norm=batch", "norm.running_var_init=-1.0"),
        ("norm=batch", "norm.weight_init=[0.0]"),
        ("norm=group", "norm.weight_init=[1.0,-0.5]"),
        ("norm=layer", "norm.weight_init=[.nan,0.0]"),
        ("data=image_folder", "data.load_size=0"),
        ("model=resblock_gan", "model.z_dim=0"),
        ("model=resblock_gan", "model.g_widths=[]"),
        ("model=resblock_gan", "model.g_widths=[8,8,8,0]"),
        ("model=resblock_gan", "model.d_widths=[]"),
        ("model=resblock_gan", "model.d_widths=[8,-8]"),
        ("model=resblock_gan", "model.d_downsamplings=4"),  # of three blocks
    ],
)
def test_a_choices_own_value_out_of_range_is_named(choice: str, change: str):
    assert refused(change, choices=(choice,)).startswith(change.partition("=")[0] + "=")


def test_start_values_that_a_norm_has_no_use_for_are_refused():
    message = refused("norm.weight_init=[0.0,0.0]")  # instance norm without an affine
    assert message.startswith("norm.weight_init=[0.0, 0.0] needs") and "norm.affine=true" in message
    build(composed("norm.weight_init=[0,0]", "norm.affine=true"))
    without = {"weight_init": ["none"], "running_var_init": ["none", "instance", "group", "layer"]}
    for key, norms in without.items():
        for norm in norms:
            message = refused(f"norm.{key}=0", choices=(f"norm={norm}",))
            assert message.startswith(f"norm.{key} is not a configuration key")


def test_losses_that_cannot_work_say_why():
    assert "loss.gradient_penalty=10" in refused("loss.gan=wgan")
    for key in ("r1", "r2", "gradient_penalty"):
        message = refused(f"loss.{key}=1", choices=("norm=batch",))
        assert "norm=batch" in message and "choose norm= instance, group, layer, none" in message
        build(composed("model=resblock_gan", "norm=batch", f"loss.{key}=1", *SMALL))
    message = refused("loss.diffaugment=[colour]")
    assert message.startswith("loss.diffaugment") and "color, translation, cutout" in message


def test_sizes_that_cannot_work_say_why():
    assert "data.image_size is 16" in refused("data.image_size=16", choices=RESBLOCK_GAN)
    assert "multiple of 4" in refused("data.image_size=30")
    assert "one value per plane" in refused("data.image_size=8")
    assert "num_groups" in refused("norm.num_groups=3", choices=("norm=group",))


# ---- dead keys

TINY = ["data.batch_size=2", "trainer.steps=2", "trainer.device=cpu"]
CYCLEGAN = [*TINY, "data.image_size=16", "model.width=2", "model.blocks=1", "model.d_width=2"]
RESBLOCK = [
    *TINY, "model=resblock_gan", "data.image_size=8", "model.g_widths=[4,4]", "model.d_widths=[4]",
    "model.d_downsamplings=1",
]  # fmt: skip


def classes() -> list[type[Section]]:
    """Of the schema, without those that only others are made of."""
    found = [kind for kind in vars(schema).values() if isinstance(kind, type)]
    bases = {Section, schema.ModelConfig, schema.NormConfig, schema.DataConfig}
    own = [each.config for table in (NORMS, DATA, TASKS) for each in table.values()]
    return list({k for k in [*found, *own] if issubclass(k, Section) and k not in bases})


@contextmanager
def recorded() -> Iterator[set[tuple[str, str]]]:
    """(class, field) for every field that a file of gannorm's reads, but config.py itself."""
    reads: set[tuple[str, str]] = set()
    home = str(Path(config.__file__).parent)

    def read(self: object, name: str) -> object:
        code = sys._getframe(1).f_code
        file, by_property = (
            code.co_filename,
            isinstance(getattr(type(self), code.co_name, 0), property),
        )
        if file == schema.__file__ and not by_property:
            return object.__getattribute__(self, name)
        if file.startswith(home) and file != config.__file__:
            reads.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        for kind in classes():
            patch.setattr(kind, "__getattribute__", read)
        yield reads


def dead(reads: set[tuple[str, str]]) -> set[tuple[str, str]]:
    keys = {(kind.__name__, field) for kind in classes() for field in kind.model_fields}
    return keys - reads


def write_images(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_mnist(folder: Path, count: int = 20) -> None:
    """Files of MNIST's format with noise in them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            body = rng.integers(0, 10, shape, dtype=np.uint8).tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + body)


def run_everything(root: Path) -> None:
    """Both models trained, on each kind of data, with each kind of norm."""
    pair = [f"data.root={root / 'pair'}", "data.load_size=18", "data.num_workers=0"]
    for name in ("trainA", "trainB", "testA"):
        write_images(root / "pair" / name)
    write_mnist(root / "mnist" / "MNIST" / "raw")
    mnist = ["data=mnist", f"data.root={root / 'mnist'}", "data.download=false"]
    train(composed(*CYCLEGAN, "data=folder_pair", *pair), root / "a")
    train(composed(*RESBLOCK), root / "b")
    missing = ["metrics.extractor=inception", f"metrics.weights={root / 'missing'}"]
    with pytest.raises(RequestError, match="missing"):
        train(composed(*CYCLEGAN, "data=folder_pair", *pair, *missing), root / "d")
    assert not (root / "d").exists()
    train(composed(*RESBLOCK, *mnist), root / "c")
    folder = [f"data.root={root / 'pair'}", "data.load_size=10", "data.num_workers=0"]
    for labels in ("true", "false"):  # the folders are classes, or not
        choice = ["data=image_folder", "norm=batch", f"data.labels={labels}", *folder]
        train(composed(*RESBLOCK, *choice), root / f"labels_{labels}")
    train(composed(*RESBLOCK, "trainer.steps=3", f"resume={root / 'b'}"), root / "b")
    with pytest.raises(RequestError, match="does not fit"):
        train(composed(*CYCLEGAN, "model.width=6", f"init_from.path={root / 'a'}"), root / "e")
    for norm in NORMS:
        model = RESBLOCK if norm.startswith("conditional") else CYCLEGAN
        build(composed(*model, f"norm={norm}"))


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch, recorded() as reads:
        patch.setattr(
            "gannorm.metrics.features.STEPS", 2
        )  # of the classifiers, which are not at issue
        run_everything(tmp_path_factory.mktemp("runs"))
    return reads


def test_every_key_is_read(reads: set[tuple[str, str]]):
    assert not dead(reads)


def test_a_dead_key_is_found(monkeypatch: pytest.MonkeyPatch):
    class WithDeadKey(InstanceNormConfig):
        unread: int = 0

    monkeypatch.setitem(NORMS, "instance", replace(NORMS["instance"], config=WithDeadKey))
    with recorded() as reads:
        cfg = build(composed(*CYCLEGAN, "+norm.unread=3"))
    assert cfg.norm.unread == 3
    name = WithDeadKey.__name__
    assert {key for key in dead(reads) if key[0] == name} == {(name, "unread")}


# ---- data by config


def test_image_folders(tmp_path: Path):
    for name in ("cats", "dogs"):
        write_images(tmp_path / name, 3)
    sizes = ["data.image_size=8", "data.load_size=10", "data.channels=1"]
    for flip in (True, False):
        choice = ["data=image_folder", f"data.root={tmp_path}", *sizes, f"data.flip={flip}"]
        data = build_data(typed(composed("model=resblock_gan", *choice)).data)
        assert data.num_classes == 2 and len(data.domains[0]) == 6
        draws = [torch.Generator().manual_seed(i) for i in range(9)]
        images = torch.stack([data.domains[0].fetch([0], g)["image"][0] for g in draws])
        assert images.shape == (9, 1, 8, 8) and images.abs().max() <= 1
        assert len(images.unique(dim=0)) > 1  # cropped at random
    assert data.domains[0].fetch([0, 5], torch.Generator())["label"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_set_that_is_not_there_is_refused(name: str, tmp_path: Path):
    choice = [f"data={name}", f"data.root={tmp_path}", "data.download=false"]
    cfg = typed(composed("model=resblock_gan", *choice))
    with pytest.raises(RequestError, match=f"data={name}: not found in {tmp_path}.*data=digits"):
        build_data(cfg.data)
