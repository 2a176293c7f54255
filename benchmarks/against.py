"""A peer's own training step and ours, on the same shapes: `python -m benchmarks.step --peer`.

Each runs in a process of its own, as its users run it, and they take turns (A B A B): what slows
the machine down for a while slows both. The peer's code is its checkout's, unchanged; what it
imports for other ends than training (metrics, data sets) need not be installed. Both networks must
have the same number of parameters, or nothing is timed.
"""

import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import step, timing
from gannorm.errors import RequestError
from gannorm.training.options import check_options

Step = Callable[[], object]
Sizes = dict[str, int]


class Peer(NamedTuple):
    """What is trained on both sides.

    Attributes:
        what: the networks, in words.
        ours: our command line for them.
        entry: a file that its checkout has.
        absent: modules that its step does not use.
        build: (batch, pixels) to the networks and one training step; the checkout can be imported.
        batch, pixels: as published.
    """

    what: str
    ours: list[str]
    entry: str
    absent: tuple[str, ...]
    build: Callable[[int, int], tuple[dict[str, nn.Module], Step]]
    batch: int
    pixels: int


def _cut(batch: int, pixels: int) -> tuple[dict[str, nn.Module], Step]:
    """CycleGAN as contrastive-unpaired-translation has it; its anti-aliasing filters left out,
    which ours and the published network do not have."""
    create_model = import_module("models").create_model
    train_options = import_module("options.train_options").TrainOptions

    with tempfile.TemporaryDirectory() as folder:
        device = "0" if torch.cuda.is_available() else "-1"
        options = train_options(
            f"--model cycle_gan --gpu_ids {device} --no_antialias --no_antialias_up "
            f"--batch_size {batch} --checkpoints_dir {folder}"
        ).parse()
        options.amp = False  # which its cycle_gan asks for, and its parser does not have
        model = create_model(options)
    images = {side: torch.rand(batch, 3, pixels, pixels) * 2 - 1 for side in "AB"}
    paths = {"A_paths": [""] * batch, "B_paths": [""] * batch}

    def step() -> None:
        model.set_input({**images, **paths})
        model.optimize_parameters()

    return {name: getattr(model, f"net{name}") for name in model.model_names}, step


def _mimicry(batch: int, pixels: int) -> tuple[dict[str, nn.Module], Step]:
    nets = import_module("torch_mimicry.nets.cgan_pd.cgan_pd_32")
    metric_log = import_module("torch_mimicry.training.metric_log").MetricLog
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = nets.CGANPDGenerator32(num_classes=10, ngf=64).to(device)
    d = nets.CGANPDDiscriminator32(num_classes=10, ndf=64).to(device)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.0, 0.9)) for net in (g, d)]
    images = torch.rand(batch, 3, pixels, pixels, device=device) * 2 - 1
    real = images, torch.arange(batch, device=device) % 10

    def step() -> None:
        log = metric_log()
        d.train_step(real_batch=real, netG=g, optD=optimizers[1], log_data=log, device=device)
        g.train_step(real_batch=real, netD=d, optG=optimizers[0], log_data=log, device=device)

    return {"G": g, "D": d}, step


def _biggan(batch: int, pixels: int) -> tuple[dict[str, nn.Module], Step]:
    """As its scripts/launch_cifar_ema.sh, with one discriminator step."""
    networks, utils = import_module("BigGAN"), import_module("utils")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True  # as its train.py
    line = (
        "--dataset C10 --num_D_steps 1 --G_lr 2e-4 --D_lr 2e-4 --G_attn 0 --D_attn 0 "
        f"--G_init N02 --D_init N02 --ema --ema_start 0 --batch_size {batch}"
    )
    config = vars(utils.prepare_parser().parse_args(line.split()))
    config |= {
        "resolution": pixels, "n_classes": 10, "G_activation": nn.ReLU(), "D_activation": nn.ReLU(),
    }  # fmt: skip
    g = networks.Generator(**config).to(device)
    d = networks.Discriminator(**config).to(device)
    average = networks.Generator(**config | {"skip_init": True, "no_optim": True}).to(device)
    ema = utils.ema(g, average, config["ema_decay"], config["ema_start"])
    z, y = utils.prepare_z_y(batch, g.dim_z, 10, device=device)
    state = {"itr": 0}
    train = import_module("train_fns").GAN_training_function(
        g, d, networks.G_D(g, d), z, y, ema, state, config
    )
    images = torch.rand(batch, 3, pixels, pixels, device=device) * 2 - 1
    labels = torch.arange(batch, device=device) % 10

    def step() -> None:
        state["itr"] += 1
        train(images, labels)

    return {"G": g, "D": d}, step


PEERS = {
    "cut": Peer(
        "CycleGAN, 64 filters, 9 blocks, with identity loss", ["experiment=cyclegan_horse2zebra"],
        "models/cycle_gan_model.py", ("dominate", "visdom"), _cut, 1, 128,
    ),
    "mimicry": Peer(
        "cGAN-PD, 64 channels; one step of D, one of G",
        ["experiment=sngan_cifar10", "model.g_widths=[64,64,64,64]", "model.d_widths=[64,64,64,64]",
         "optim.d_steps=1"],
        "torch_mimicry/nets/cgan_pd/cgan_pd_32.py", ("skimage", "tensorflow", "tensorboard"),
        _mimicry, 64, 32,
    ),
    "biggan": Peer(
        "BigGAN for CIFAR-10, ch 64; one step of D, one of G",
        ["experiment=biggan_cifar10", "optim.d_steps=1"],
        "BigGAN.py", ("h5py",), _biggan, 64, 32,
    ),
}  # fmt: skip


# ---- one contestant, in its process

_step: Step | None = None


def _start_peer(name: str, checkout: str, batch: int, pixels: int) -> Sizes:
    global _step
    peer = PEERS[name]
    for module in peer.absent:
        try:
            __import__(module)
        except ImportError:
            sys.modules[module] = MagicMock(__spec__=ModuleSpec(module, None), __path__=[])
    sys.path.insert(0, checkout)
    with contextlib.redirect_stdout(io.StringIO()):
        networks, _step = peer.build(batch, pixels)
    return _sizes(networks)


def _start_ours(overrides: list[str], extra: list[str], device: str) -> Sizes:
    global _step
    timing.use_device(device)  # as train.py
    plain, cfg = (
        step.configured(*overrides, *more, f"trainer.device={device}") for more in ((), extra)
    )
    if (cfg.model, cfg.data, cfg.optim, cfg.loss, cfg.trainer.grad_accum) != (
        plain.model, plain.data, plain.optim, plain.loss, 1
    ):  # fmt: skip
        raise RequestError(f"{' '.join(extra)} is another step than the peer's; change how it runs")
    check_options(cfg, torch.device(device))
    trained = step.Trained("ours", [*overrides, *extra], device, synthetic=True)
    _step = trained.step
    return _sizes(trained.task.networks)


def _sizes(networks: dict[str, nn.Module]) -> Sizes:
    """Parameters, by network."""
    return {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()}


def _timed(device: str) -> float:
    assert _step is not None
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    _step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(device: str) -> float:
    """The most memory so far, bytes: of the GPU, or of the whole process; NaN: nobody tells."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 2**20 * timing.resident("HWM")


# ---- both


def _alone(device: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _begin, (device,))


def _begin(device: str) -> None:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a peer takes a GPU where there is one


def _started(
    theirs: ProcessPoolExecutor, name: str, checkout: Path, batch: int, pixels: int
) -> Sizes:
    try:
        return theirs.submit(_start_peer, name, str(checkout), batch, pixels).result()
    except Exception as error:
        raise RequestError(f"--peer {name}: its networks cannot be built: {error!r}") from error


def compare(
    name: str, checkout: Path, device: str, rounds: int, extra: list[str]
) -> dict[str, Any]:
    """Seconds of a step of both, taken in turns, with the medians of the ratios and the peaks.

    extra: overrides of ours, which say how it runs.

    Raises:
        RequestError: the checkout is not the peer's, or its networks have other sizes than ours.
    """
    if name not in PEERS:
        raise RequestError(f"--peer {name}: choose one of {', '.join(PEERS)}")
    peer = PEERS[name]
    if not (checkout / peer.entry).is_file():
        raise RequestError(f"--peer {name} {checkout}: has no {peer.entry}; give {name}'s checkout")
    batch, pixels = peer.batch, peer.pixels
    sides = [f"data.image_size={pixels}", f"data.batch_size={batch}"]
    with _alone(device) as ours, _alone(device) as theirs:
        sizes = {
            "ours": ours.submit(_start_ours, [*peer.ours, *sides], extra, device).result(),
            name: _started(theirs, name, checkout, batch, pixels),
        }
        if sizes["ours"] != sizes[name]:
            raise RequestError(f"--peer {name}: its networks have other sizes than ours: {sizes}")
        taken: dict[str, list[float]] = {"ours": [], name: []}
        chance = random.Random(0)
        for _ in range(2):  # to get warm
            for side in (ours, theirs):
                side.submit(_timed, device).result()
        for _ in tqdm(range(rounds), desc=name, unit="round"):
            for who in chance.sample(list(taken), 2):
                side = ours if who == "ours" else theirs
                taken[who].append(side.submit(_timed, device).result())
        peaks = {"ours": ours.submit(_peak, device).result()}
        peaks[name] = theirs.submit(_peak, device).result()
    ratios = [b / a for a, b in zip(taken["ours"], taken[name], strict=True)]
    return {
        "peer": name,
        "what": peer.what,
        "batch": batch,
        "pixels": pixels,
        "options": extra,
        "parameters": sizes["ours"],
        "seconds": taken,
        "median_seconds": {who: statistics.median(each) for who, each in taken.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "peak_bytes": peaks,
    }


def row(found: dict[str, Any]) -> str:
    """A result as a line of a table."""
    name, seconds, peaks = found["peer"], found["median_seconds"], found["peak_bytes"]
    return (
        f"| {found['what']}, batch {found['batch']}, {found['pixels']}x{found['pixels']} | "
        f"{seconds['ours']:.2f} s | {name}: {seconds[name]:.2f} s | **{found['ratio']:.2f}x** "
        f"({min(found['ratios']):.2f} to {max(found['ratios']):.2f}) | "
        f"{peaks['ours'] / 1e9:.2f} / {peaks[name] / 1e9:.2f} GB |"
    )


def run(
    name: str, checkout: Path, device: str, rounds: int, extra: list[str], out: Path | None
) -> None:
    result = timing.environment(device) | compare(name, checkout, device, rounds, extra)
    path = timing.result_path(result, out, f"step-{name}-")
    timing.write(result, path)
    print(row(result))
    print(path)
