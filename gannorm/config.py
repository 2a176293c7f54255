"""The typed schema of a run's configuration, and how a composed config becomes it.

The YAML files under `conf/` hold the values, these classes the types. A key that is not in its
class, a missing one, or a value of the wrong type is refused with its full name.
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gannorm.errors import RequestError

Backend = Enum("Backend", ["auto", "triton", "torch"])
Precision = Enum("Precision", ["fp32", "bf16", "fp16"])
Device = Enum("Device", ["auto", "cpu", "cuda"])
Block = Enum("Block", ["preact", "postact"])
Init = Enum("Init", ["orthogonal", "xavier", "normal"])
GanLoss = Enum("GanLoss", ["lsgan", "hinge", "nonsaturating", "wgan", "relativistic"])
Augmentation = Enum("Augmentation", ["color", "translation", "cutout"])
VarEstimator = Enum("VarEstimator", ["unbiased", "biased"])
ExtractorName = Enum("ExtractorName", ["embedded", "inception"])
Figure = Enum(
    "Figure",
    [
        "fid", "class_fid", "kid", "inception_score", "precision", "recall", "density", "coverage",
        "accuracy", "cycle_l1", "cycle_psnr", "cycle_ssim", "psnr", "ssim", "feature_distance",
    ],
)  # fmt: skip


@dataclass
class CycleGANConfig:
    name: str = MISSING
    width: int = MISSING  # channels of the generator's first convolution (ngf)
    blocks: int = MISSING  # residual blocks
    downsamplings: int = MISSING
    dropout: bool = MISSING
    d_width: int = MISSING  # channels of the discriminator's first convolution (ndf)
    d_layers: int = MISSING  # stride-2 convolutions; 3 is the 70x70 PatchGAN
    d_spectral_norm: bool = MISSING
    cycle_weight: float = MISSING
    identity_weight: float = MISSING  # relative to cycle_weight
    pool_size: int = MISSING  # past translations kept per discriminator


@dataclass
class ResBlockGANConfig:
    name: str = MISSING
    z_dim: int = MISSING
    block: Block = MISSING
    g_widths: list[int] = MISSING  # at 4x4, then behind each doubling of the resolution
    g_spectral_norm: bool = MISSING
    d_widths: list[int] = MISSING  # behind each block
    d_downsamplings: int = MISSING  # the first that many blocks halve the resolution
    d_spectral_norm: bool = MISSING
    init: Init = MISSING


ModelConfig = CycleGANConfig | ResBlockGANConfig


@dataclass
class NormConfig:
    name: str = MISSING
    backend: Backend = MISSING


@dataclass
class NoNormConfig(NormConfig):
    pass


@dataclass
class LayerNormConfig(NormConfig):
    eps: float = MISSING
    affine: bool = MISSING
    weight_init: list[float] | None = MISSING  # mean and standard deviation; null: the model's


@dataclass
class InstanceNormConfig(LayerNormConfig):
    pass


@dataclass
class GroupNormConfig(LayerNormConfig):
    num_groups: int = MISSING  # at most: a layer with fewer channels has one group a channel


@dataclass
class BatchNormConfig(LayerNormConfig):
    momentum: float = MISSING
    var_estimator: VarEstimator = MISSING
    running_var_init: float = MISSING  # what evaluation divides by before the first batch


@dataclass
class DataConfig:
    name: str = MISSING
    image_size: int = MISSING
    channels: int = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class DigitsConfig(DataConfig):
    pass


@dataclass
class FolderConfig(DataConfig):
    root: str = MISSING
    load_size: int = MISSING  # resized to this, then cropped to image_size at random
    flip: bool = MISSING


@dataclass
class TorchvisionConfig(DataConfig):
    root: str = MISSING
    download: bool = MISSING
    flip: bool = MISSING


@dataclass
class LossConfig:
    gan: GanLoss = MISSING
    r1: float = MISSING  # penalty on the discriminator's gradient at real images
    r2: float = MISSING  # at generated ones
    gradient_penalty: float = MISSING  # between them, towards a gradient of norm 1 (WGAN-GP)
    diffaugment: list[Augmentation] = MISSING  # of what the discriminator sees


@dataclass
class OptimConfig:
    lr_g: float = MISSING
    lr_d: float = MISSING
    beta1: float = MISSING
    beta2: float = MISSING
    d_steps: int = MISSING  # discriminator steps per generator step
    decay_from: float = MISSING  # fraction of the run after which lr falls linearly to 0
    clip_norm: float | None = MISSING  # largest gradient norm per network
    ema_decay: float = MISSING
    ema_start: int = MISSING  # until this step the average is a copy


@dataclass
class TrainerConfig:
    steps: int = MISSING
    device: Device = MISSING
    precision: Precision = MISSING
    log_every: int = MISSING
    sample_every: int = MISSING
    eval_every: int = MISSING
    checkpoint_every: int = MISSING
    keep_checkpoints: int = MISSING  # the newest that many stay


@dataclass
class MetricsConfig:
    extractor: ExtractorName = MISSING
    weights: str | None = MISSING  # Inception's file; null: downloaded
    samples: int | None = MISSING  # generated for an evaluation; null: as many as are held out
    standing_batches: int = MISSING  # that renew the batch norms' statistics; 0: the training's
    best: Figure = MISSING  # what best.pt is the best of; the mean of both directions
    patience: int | None = MISSING  # evaluations without a better one that end the run
    cache: str = MISSING  # folder of the trained extractors and the real images' features


@dataclass
class Config:
    seed: int = MISSING
    resume: str | None = MISSING
    model: Any = MISSING
    norm: Any = MISSING
    data: Any = MISSING
    loss: LossConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    metrics: MetricsConfig = MISSING


SECTIONS: dict[str, dict[str, type]] = {
    "model": {"cyclegan": CycleGANConfig, "resblock_gan": ResBlockGANConfig},
    "norm": {
        "instance": InstanceNormConfig,
        "batch": BatchNormConfig,
        "group": GroupNormConfig,
        "layer": LayerNormConfig,
        "none": NoNormConfig,
        "conditional_instance": InstanceNormConfig,
        "conditional_batch": BatchNormConfig,
    },
    "data": {
        "digits": DigitsConfig,
        "digits_m": DigitsConfig,
        "folder_pair": FolderConfig,
        "image_folder": FolderConfig,
        "cifar10": TorchvisionConfig,
        "mnist": TorchvisionConfig,
    },
}


def typed(cfg: DictConfig) -> Config:
    """The composed config as a `Config`.

    Raises:
        RequestError: an unknown key (with the nearest right one), a missing value, a wrong type.
    """
    schema = OmegaConf.structured(Config)
    for section, kind in (
        ("loss", LossConfig), ("optim", OptimConfig), ("trainer", TrainerConfig),
        ("metrics", MetricsConfig),
    ):  # fmt: skip
        schema[section] = OmegaConf.structured(kind)
    try:
        for section, kinds in SECTIONS.items():
            name = cfg[section].name
            if name not in kinds:
                raise RequestError(
                    f"{section}.name={name!r} is unknown; choose {section}= {', '.join(kinds)}"
                )
            schema[section] = OmegaConf.structured(kinds[name])
        OmegaConf.set_struct(schema, True)
        result = OmegaConf.to_object(OmegaConf.merge(schema, cfg))
    except OmegaConfBaseException as error:
        raise RequestError(explain(error, keys_of(schema))) from error
    assert isinstance(result, Config)
    _check_ranges(result)
    return result


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config."""
    keys = []
    for key in node:
        name = f"{prefix}{key}"
        keys.append(name)
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += keys_of(child, name + ".")
    return keys


def nearest(word: str, choices: list[str]) -> str:
    """' (did you mean X?)', or nothing."""
    found = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def explain(error: OmegaConfBaseException, keys: list[str]) -> str:
    """One line for an error of omegaconf's."""
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if not key:
        return first
    if key.partition("[")[0] not in keys:  # an element of a list is no key
        return f"{key} is not a configuration key{nearest(key, keys)}"
    return f"{key}: {first}"


def explain_composition(error: Exception, conf: Path) -> str:
    """One line for an error of Hydra's while it composed the files under `conf`."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        choices = sorted(error.options)
        return f"{group}={choice} is unknown{nearest(choice, choices)}; choose {group}= " + (
            ", ".join(choices)
        )
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        keys = keys_of(OmegaConf.load(conf / "config.yaml"))
        for path in sorted(conf.glob("*/*.yaml")):
            if path.parent.name != "experiment":
                keys += [path.parent.name, *keys_of(OmegaConf.load(path), f"{path.parent.name}.")]
        keys = [k for k in keys if "defaults" not in k and not k.startswith("hydra")]
        return explain(cause, keys)
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _check_ranges(cfg: Config) -> None:
    """Refuse values that no run can work with, by their full name."""
    if not 0 <= cfg.seed < 2**32:
        raise RequestError(f"seed={cfg.seed} must lie in 0..{2**32 - 1}")
    positive = {
        "trainer.steps", "trainer.log_every", "trainer.sample_every", "trainer.eval_every",
        "trainer.checkpoint_every", "trainer.keep_checkpoints", "data.batch_size",
        "data.image_size", "optim.d_steps", "optim.lr_g", "optim.lr_d", "model.width",
        "model.d_width", "model.z_dim", "optim.clip_norm", "norm.num_groups", "data.load_size",
        "metrics.samples", "metrics.patience",
    }  # fmt: skip
    fractions = {"optim.decay_from", "optim.beta1", "optim.beta2", "optim.ema_decay",
                 "norm.momentum"}  # fmt: skip
    for section in fields(cfg):
        node = getattr(cfg, section.name)
        if not is_dataclass(node):
            continue
        for field in fields(node):
            name, value = f"{section.name}.{field.name}", node.__dict__[field.name]
            if field.type == list[int] and (not value or min(value) < 1):
                raise RequestError(f"{name}={value} must hold positive numbers, one at least")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise RequestError(f"{name}={value} must be finite")
            if name in ("optim.beta1", "optim.beta2") and value == 1:
                raise RequestError(f"{name}={value} must be smaller than 1")
            if name in positive and value <= 0:
                raise RequestError(f"{name}={value} must be positive")
            if name in fractions and not 0 <= value <= 1:
                raise RequestError(f"{name}={value} must lie between 0 and 1")
            if value < 0:
                raise RequestError(f"{name}={value} must not be negative")
    model = cfg.model
    if isinstance(model, ResBlockGANConfig) and model.d_downsamplings > len(model.d_widths):
        raise RequestError(
            f"model.d_downsamplings={model.d_downsamplings} must not exceed the number of blocks "
            f"in model.d_widths={model.d_widths}"
        )
    start = getattr(cfg.norm, "weight_init", None)
    if start is not None:
        shown = f"norm.weight_init={start}"
        if len(start) != 2 or not all(map(math.isfinite, start)) or start[1] < 0:
            raise RequestError(
                f"{shown} must be a mean and a standard deviation, the latter not negative"
            )
        if not cfg.norm.affine:
            raise RequestError(f"{shown} needs a weight; set norm.affine=true")
    loss = cfg.loss
    if loss.gan.name == "wgan" and not max(loss.r1, loss.r2, loss.gradient_penalty) > 0:
        raise RequestError(
            "loss.gan=wgan needs a bounded critic; set loss.gradient_penalty=10 (loss=wgan_gp)"
        )
    if cfg.data.channels not in (1, 3):
        raise RequestError(f"data.channels={cfg.data.channels} must be 1 (grey) or 3 (colour)")
