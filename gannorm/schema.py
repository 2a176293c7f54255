"""The typed schema of `conf/`: a class for each kind of section, a field for each key.

The YAML files hold the values, these classes the types and bounds (`gannorm.config.typed` joins
them). Names of norms, data sets, tasks, losses and figures are looked up in their tables.
"""

import math
import signal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Widths = Annotated[list[PositiveInt], Field(min_length=1)]
Augmentation = Literal["color", "translation", "cutout"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_bool(cls, value: Any, info: ValidationInfo) -> Any:
        if (
            isinstance(value, bool)
            and cls.model_fields[str(info.field_name)].annotation is not bool
        ):
            raise ValueError("must not be true or false")  # which pydantic reads as 1 and 0
        return value


class ModelConfig(Section):
    name: str


class CycleGANConfig(ModelConfig):
    width: PositiveInt  # channels of the generator's first convolution (ngf)
    blocks: NonNegativeInt  # residual blocks
    downsamplings: NonNegativeInt
    dropout: bool
    d_width: PositiveInt  # channels of the discriminator's first convolution (ndf)
    d_layers: NonNegativeInt  # stride-2 convolutions; 3 is the 70x70 PatchGAN
    d_spectral_norm: bool
    cycle_weight: NonNegativeFloat
    identity_weight: NonNegativeFloat  # relative to cycle_weight
    pool_size: NonNegativeInt  # past translations kept per discriminator


class ResBlockGANConfig(ModelConfig):
    z_dim: PositiveInt
    block: Literal["preact", "postact"]
    g_widths: Widths  # at 4x4, then behind each doubling of the resolution
    g_spectral_norm: bool
    d_widths: Widths  # behind each block
    d_downsamplings: NonNegativeInt  # the first that many blocks halve the resolution
    d_spectral_norm: bool
    init: Literal["orthogonal", "xavier", "normal"]

    @model_validator(mode="after")
    def _check(self) -> "ResBlockGANConfig":
        if self.d_downsamplings > len(self.d_widths):
            raise ValueError(
                f"model.d_downsamplings={self.d_downsamplings} must not exceed the number of "
                f"blocks in model.d_widths={self.d_widths}"
            )
        return self


class NormConfig(Section):
    name: str
    backend: Literal["auto", "triton", "cpu", "torch"]


class NoNormConfig(NormConfig):
    pass


def _mean_and_std(pair: list[float]) -> list[float]:
    if len(pair) != 2 or not all(map(math.isfinite, pair)) or pair[1] < 0:
        raise ValueError("must be a mean and a standard deviation, the latter not negative")
    return pair


class LayerNormConfig(NormConfig):
    eps: NonNegativeFloat
    affine: bool
    # Mean and standard deviation of the weights at the start; null: the model's.
    weight_init: Annotated[list[float], AfterValidator(_mean_and_std)] | None

    @model_validator(mode="after")
    def _check(self) -> "LayerNormConfig":
        if self.weight_init is not None and not self.affine:
            raise ValueError(
                f"norm.weight_init={self.weight_init} needs a weight; set norm.affine=true"
            )
        return self


class InstanceNormConfig(LayerNormConfig):
    pass


class GroupNormConfig(LayerNormConfig):
    num_groups: PositiveInt  # at most: a layer with fewer channels has one group a channel


class BatchNormConfig(LayerNormConfig):
    momentum: Share
    var_estimator: Literal["unbiased", "biased"]
    running_var_init: NonNegativeFloat  # what evaluation divides by before the first batch


def _pixels(value: Any) -> Any:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("must be a positive number of pixels, or two: [height, width]")
    return value


def _grey_or_colour(value: Any) -> Any:
    each = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(type(count) is int and count in (1, 3) for count in each):
        raise ValueError("must be 1 (grey) or 3 (colour), or two of these: [of A, of B]")
    return value


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, list) else (value, value)


Pixels = Annotated[Any, AfterValidator(_pixels)]


class DataConfig(Section):
    name: str
    image_size: Pixels
    channels: Annotated[Any, AfterValidator(_grey_or_colour)]
    batch_size: PositiveInt  # of each process
    global_batch_size: PositiveInt | None = None  # of all of them; null: batch_size of each
    num_workers: NonNegativeInt
    worker_timeout: NonNegativeFloat = 0.0  # seconds without a batch; 0: none

    @property
    def whole_batch(self) -> int:
        """Samples of all processes' batch."""
        return self.global_batch_size or self.batch_size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that are trained on."""
        return _pair(self.image_size)

    @property
    def channel_pair(self) -> tuple[int, int]:
        """Channels of domain A and of domain B."""
        return _pair(self.channels)


class DigitsConfig(DataConfig):
    pass


class FolderConfig(DataConfig):
    root: str
    # What older runs, which have no such key, did stands as its default here and below.
    preprocess: Literal[
        "resize_and_crop", "scale_width_and_crop", "scale_shortside_and_crop", "crop", "none"
    ] = "resize_and_crop"
    load_size: Pixels  # what preprocess resizes or scales to, before the crop to image_size
    flip: bool
    on_bad: Literal["fail", "skip"] = "fail"  # images that cannot be used
    cache: str = (
        "~/.cache/gannorm"  # folder of what is known of the files, and of their resized pixels
    )
    cache_gb: NonNegativeFloat = 0.0  # of pixels, at most; more are decoded again each time

    @property
    def load(self) -> tuple[int, int]:
        """Height and width that load_size means; one number is the shorter side's."""
        if isinstance(self.load_size, list):
            return _pair(self.load_size)
        height, width = self.size
        short = min(height, width)
        return round(self.load_size * height / short), round(self.load_size * width / short)


class ImageFolderConfig(FolderConfig):
    labels: bool = True  # the folders are classes


class TorchvisionConfig(DataConfig):
    root: str
    download: bool
    flip: bool


class LossConfig(Section):
    gan: str
    r1: NonNegativeFloat  # penalty on the discriminator's gradient at real images
    r2: NonNegativeFloat  # at generated ones
    gradient_penalty: NonNegativeFloat  # between them, towards a gradient of norm 1 (WGAN-GP)
    diffaugment: list[Augmentation]  # of what the discriminator sees


class OptimConfig(Section):
    lr_g: PositiveFloat
    lr_d: PositiveFloat
    beta1: Beta
    beta2: Beta
    d_steps: PositiveInt  # discriminator steps per generator step
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # how the rates fall
    decay_from: Share  # fraction of the run after which they do, to 0 at its end
    restart: bool = False  # resumed under others of these or other steps, the schedule begins anew
    clip_norm: PositiveFloat | None  # largest gradient norm per network
    ema_decay: Share
    ema_start: NonNegativeInt  # until this step the average is a copy


# What a process is told by these is something else, or cannot be heard.
_NO_REQUESTS = (
    "SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS",
    "SIGCHLD", "SIGPIPE",
)  # fmt: skip
STOP_SIGNALS = [each.name for each in signal.Signals if each.name not in _NO_REQUESTS]


def _signals(names: list[str]) -> list[str]:
    unknown = [name for name in names if name not in STOP_SIGNALS]
    if unknown:
        raise ValueError(f"names {unknown[0]!r}; choose from {', '.join(STOP_SIGNALS)}")
    return names


class TrainerConfig(Section):
    steps: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    log_every: PositiveInt
    sample_every: PositiveInt
    eval_every: PositiveInt
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt  # the newest that many stay
    # What older runs, which have no such keys, did stands as the default.
    stop_signals: Annotated[list[str], AfterValidator(_signals)] = ["SIGINT", "SIGTERM"]
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    nonfinite_limit: PositiveInt = 10  # steps skipped in a row, or rewinds
    deterministic: bool = False
    memory_format: Literal["auto", "contiguous", "channels_last"] = "contiguous"
    grad_accum: PositiveInt = 1  # batches of an optimizer step
    checkpointing: bool = False  # of activations: made again in the backward pass
    compile: bool = False  # the trained networks' forward passes
    cuda_graph: bool = False  # a whole step


class MetricsConfig(Section):
    extractor: Literal["embedded", "inception"]
    weights: str | None  # Inception's file; null: downloaded
    samples: PositiveInt | None  # generated for an evaluation; null: as many as are held out
    standing_batches: NonNegativeInt  # that renew the batch norms' statistics; 0: the training's
    best: str  # what best.pt is the best of; the mean of both directions
    patience: PositiveInt | None  # evaluations without a better one that end the run
    cache: str  # folder of the trained extractors and the real images' features


class InitConfig(Section):
    path: str | None  # a checkpoint, a run folder, safetensors, or files of the reference CycleGAN
    use: Literal["averaged", "trained"]  # of the generators, where the file has both
    strict: bool  # refuse keys that do not fit; false: they keep their fresh weights


class Config(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    resume: str | None
    init_from: InitConfig = InitConfig(
        path=None, use="averaged", strict=True
    )  # older runs have none
    model: ModelConfig
    norm: NormConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    trainer: TrainerConfig
    metrics: MetricsConfig
