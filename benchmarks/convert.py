"""What `convert` brings in a whole model: one training step, forward and backward.

    python -m benchmarks.convert

Three contestants with the same weights, in turns: the model as it is, under torch.compile, and
converted; outputs are compared before anything is timed. On a CPU convolutions take most of a step,
so the part that the norms and what stands around them take is measured too: it bounds what any norm
could bring. Models: torchvision's resnet50, and monai's UNet (instance norm, LeakyReLU).
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from gannorm import convert
from gannorm.errors import RequestError

NORMS = ("batch_norm", "instance_norm", "relu", "clamp_min_", "threshold_backward")
AGREE = 2e-3  # outputs in training, relative to the largest


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def unet() -> nn.Module:
    try:
        from monai.networks.nets import UNet
    except ImportError:
        raise RequestError("the U-Net is monai's: pip install -e '.[zoo]'") from None
    return UNet(
        spatial_dims=2, in_channels=3, out_channels=2, channels=(32, 64, 128, 256, 512),
        strides=(2, 2, 2, 2), act=("LeakyReLU", {"negative_slope": 0.1}),
        norm=("instance", {"affine": True}),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (resnet50, (16, 3, 128, 128)),
    "unet": (unet, (8, 3, 128, 128)),
}


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    model(x).square().mean().backward()


def share_of_norms(model: nn.Module, x: Tensor) -> float:
    """The part of a step that torch's norms and activations take."""
    step(model, x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(model, x)
    spent = {e.key: float(e.self_cpu_time_total) for e in profiler.key_averages()}
    norms = sum(t for name, t in spent.items() if any(part in name for part in NORMS))
    return norms / sum(spent.values())


def measure(name: str, seconds: float, size: tuple[int, ...]) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = MODELS[name][0]()
    x = torch.randn(size)
    ours = convert(copy.deepcopy(plain))
    torch._dynamo.reset()  # what it has learnt of another model's shapes
    compiled = torch.compile(copy.deepcopy(plain), dynamic=False)
    outputs = [model(x).detach() for model in (plain, ours, compiled)]
    scale = outputs[0].abs().max()
    off = max(float((y - outputs[0]).abs().max() / scale) for y in outputs[1:])
    if off > AGREE:
        raise RuntimeError(f"{name}: outputs differ by {off:.1e} of the largest")
    contestants: dict[str, Any] = {"eager": plain, "compiled": compiled, "ours": ours}
    runs: dict[str, timing.Run] = {who: partial(step, m, x) for who, m in contestants.items()}
    times = timing.time_cpu(runs, seconds)
    row: dict[str, Any] = {"model": name, "input": list(size)}
    row |= {f"{who}_ms": round(t["wall"] / 1000, 1) for who, t in times.items()}
    return row | {"share_of_norms": share_of_norms(plain, x)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=120, help="for each model")
    parser.add_argument("--quick", action="store_true", help="small inputs, few steps")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    timing.use_device("cpu")
    result = timing.environment("cpu") | {"models": []}
    for name in args.models:
        size = (2, 3, 64, 64) if args.quick else MODELS[name][1]
        try:
            row = measure(name, 1 if args.quick else args.seconds, size)
        except RequestError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        result["models"].append(row)
        print(f"{name} {tuple(size)}: eager {row['eager_ms']} ms, compiled {row['compiled_ms']} "
              f"({row['eager_ms'] / row['compiled_ms']:.2f}x), ours {row['ours_ms']} "
              f"({row['eager_ms'] / row['ours_ms']:.2f}x); norms and activations are "
              f"{row['share_of_norms']:.0%} of the eager step")  # fmt: skip
    timing.write(result, timing.result_path(result, args.out, "convert-"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
