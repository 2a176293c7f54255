"""What samples are judged by: networks from images to features and logits, kept on disk.

`embedded`: a small classifier trained on the real images themselves, in seconds, without a
download; of their labels or, without labels, of quarter turns. `inception`: the Inception-v3 of FID
and the Inception score.
Either is an `Extractor`: images (N, C, S, S) in [-1, 1] to features (N, D) and logits (N, K).
"""

import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from gannorm.data import Source, batches
from gannorm.data.digest import digest
from gannorm.errors import RequestError
from gannorm.models.fixed_order import AdaptiveAvgPool2d
from gannorm.parallel import forked_rng

STEPS, BATCH_SIZE, LEARNING_RATE = 250, 64, 2e-3
FEATURES = 64
SHRUNK, SEEN = 64, 2048  # pixels of the shorter side, images: what turns are learned of
SEED = 0  # of the embedded extractor, whatever the run's: its figures compare runs


class Extractor(nn.Module):
    """Images (N, C, S, S) in [-1, 1] -> features (N, D), logits (N, K)."""

    protocol: str  # the network and what becomes of an image before it
    names_kinds = True  # whether the logits are of kinds of images

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().__call__(images)

    def identity(self) -> str:
        """A word for these very weights."""
        return digest(type(self).__name__, *self.state_dict().values())


class Embedded(Extractor):
    """A small convolutional classifier; its features are those of the layer before the last."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for c_in, c_out in ((channels, 32), (32, 64), (64, 96)):
            convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU()))
        self.stages = nn.ModuleList(stages)
        self.neck = nn.Sequential(
            AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(96 * 16, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, num_classes)
        self.protocol = f"embedded classifier, {FEATURES} features, images as they are"

    def maps(self, images: Tensor) -> list[Tensor]:
        """The activations (N, C, H, W) behind each stage."""
        found = []
        for stage in self.stages:
            images = stage(images)
            found.append(images)
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps(images)[-1]
        pooled = maps.shape[-2:] == (4, 4)  # as of 32x32 images: a pool of single pixels
        features = (self.neck[1:] if pooled else self.neck)(maps)
        return features, self.head(features)


class Turns(Embedded):
    """`Embedded` without labels: it tells by how many quarter turns an image was turned.

    What that takes it to see of shapes makes useful features (Gidaris et al., 2018).
    """

    names_kinds = False

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4)
        self.protocol = (
            f"embedded classifier of quarter turns, {FEATURES} features, images shrunk to {SHRUNK} "
            "pixels"
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(shrunk(images))


def shrunk(images: Tensor) -> Tensor:
    """Images (N, C, H, W) whose shorter side has SHRUNK pixels, smaller ones as they are."""
    height, width = images.shape[-2:]
    scale = SHRUNK / min(height, width)
    if scale >= 1:
        return images
    size = (round(height * scale), round(width * scale))
    return nn.functional.interpolate(images, size, mode="area")


class Inception(Extractor):
    """FID's Inception-v3 with its 2048 pooled features and 1008 logits (Heusel et al., 2017).

    The network, its weights' layout and its resize (bilinear as in TensorFlow 1, to 299 pixels)
    are torch-fidelity's; images are rounded to 8 bits before it. As is usual the logits of the
    Inception score carry no bias.

    Args:
        weights: a file of torch-fidelity's layout; None: downloaded to torch's hub folder.

    Raises:
        RequestError: torch-fidelity is not installed, there is no such file or download.
    """

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise RequestError(
                "metrics.extractor=inception needs torch-fidelity (pip install torch-fidelity); "
                "metrics.extractor=embedded needs nothing"
            ) from error
        path = None if weights is None else Path(weights).expanduser()
        try:
            if path is not None:
                torch.load(path, map_location="cpu", weights_only=True)  # else it may run code
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if path is None else str(path),
            )  # fmt: skip
        except Exception as error:
            place = "a download" if path is None else f"metrics.weights={weights}"
            raise RequestError(
                f"metrics.extractor=inception: no weights from {place} "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); give "
                "torch-fidelity's weights-inception-2015-12-05-6726825d.pth with metrics.weights="
                ", or use metrics.extractor=embedded, which needs none"
            ) from error
        self.protocol = (
            "FID's Inception-v3, 2048 features, images in 8 bits, resized to 299x299 bilinearly"
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
        features, logits = self.net(pixels.expand(-1, 3, -1, -1))
        return features, logits


def train_embedded(
    source: Source, num_classes: int, device: torch.device, seed: int = SEED
) -> Embedded:
    """The embedded classifier of `source`'s images; some seconds on a CPU.

    The same source and seed give the same classifier; the global generators are left alone.
    Returns it in evaluation mode.
    """
    channels = source.fetch([0], torch.Generator())["image"].shape[1]
    with forked_rng():
        torch.manual_seed(seed)
        net = Embedded(channels, num_classes).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for (batch,) in batches([source], batch_size=BATCH_SIZE, start=0, stop=STEPS, seed=seed):
            images, labels = batch["image"].to(device), batch["label"].to(device)
            # Shifts of up to 1/8 keep it from reading by position.
            reach = images.shape[-1] // 8
            shift = torch.randint(-reach, reach + 1, (2,)).tolist()
            _step(net, images.roll(shift, (2, 3)), labels, optimizer)
            schedule.step()
    return net.eval().requires_grad_(False)


def train_turns(source: Source, device: torch.device, seed: int = SEED) -> Turns:
    """As `train_embedded`, without labels: of the middle squares of SEEN images at most."""
    count = min(len(source), SEEN)
    index = torch.arange(count) * len(source) // count
    parts = [
        shrunk(source.fetch(each.tolist(), torch.Generator().manual_seed(int(each[0])))["image"])
        for each in index.split(BATCH_SIZE)
    ]
    side = min(parts[0].shape[-2:])
    top, left = ((length - side) // 2 for length in parts[0].shape[-2:])
    seen = torch.cat(parts)[..., top : top + side, left : left + side].to(device)
    with forked_rng():
        torch.manual_seed(seed)
        net = Turns(seen.shape[1]).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            chosen = seen[torch.randint(len(seen), (BATCH_SIZE // 4,))]
            turned = torch.cat([chosen.rot90(turns, (2, 3)) for turns in range(4)])
            turns = torch.arange(4, device=device).repeat_interleave(len(chosen))
            _step(net, turned, turns, optimizer)
            schedule.step()
    return net.eval().requires_grad_(False)


def _step(net: Embedded, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> None:
    _, logits = net(images)
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def embedded(
    source: Source, num_classes: int | None, device: torch.device, cache: Path
) -> Embedded:
    """`train_embedded`, or without classes `train_turns`, once for each content of `source` and
    each recipe: kept in `cache`."""
    parts = (Embedded, train_embedded) if num_classes else (Embedded, Turns, shrunk, train_turns)
    recipe = [inspect.getsource(part) for part in (*parts, _step)]
    constants = (STEPS, BATCH_SIZE, LEARNING_RATE, FEATURES, SEED, SHRUNK, SEEN, num_classes)
    key = f"embedded-{digest(source.digest(), *recipe, *constants)}"

    def make() -> dict[str, Tensor]:
        trained = (
            train_turns(source, device) if num_classes is None
            else train_embedded(source, num_classes, device)
        )  # fmt: skip
        return trained.cpu().state_dict()

    state = cached(cache, key, make)
    channels = state["stages.0.0.weight"].shape[1]
    net = Turns(channels) if num_classes is None else Embedded(channels, num_classes)
    net.load_state_dict(state)
    return net.to(device).eval().requires_grad_(False)


def cached(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, tensors and plain values, from the file `folder/name.pt` if it is there.

    A damaged file is made anew; a folder that cannot be written to costs the time again.
    """
    path = folder / f"{name}.pt"
    if path.is_file():
        with suppress(Exception), ZipFile(path) as archive:
            if archive.testzip() is None:  # torch looks at no checksum
                return torch.load(path, map_location="cpu", weights_only=True)
    made = make()
    # Another run may make the same.
    partial = path.with_suffix(f".{gethostname()}.{os.getpid()}.partial")
    try:
        with suppress(OSError, RuntimeError):  # torch's, for a full disk
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(made, partial)
            os.replace(partial, path)
    finally:  # for a signal too
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return made
