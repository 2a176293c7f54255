"""Runs of `train` in float64 on few digits, one after the other, in one process or in torchrun's:

    exact_training.py FOLDER KEY=VALUE ... [-- FOLDER KEY=VALUE ...]

Float32 would hide what differs: training multiplies its rounding by a million in ten steps.
"""

import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

FEW = 300
ROOT = Path(__file__).parent.parent


def in_float64():
    torch.set_default_dtype(torch.float64)
    widened = {torch.bool: torch.float32}  # a fused Adam's flag stays float32
    torch.Tensor.float = lambda t: t.to(widened.get(t.dtype, torch.float64))


def on_few_digits():
    from sklearn.utils import Bunch

    from gannorm.metrics import features

    digits = import_module("gannorm.data.digits")  # the package's `digits` is a function

    bunch = digits.load_digits()
    few = Bunch(images=bunch.images[:FEW], target=bunch.target[:FEW])
    digits.load_digits = lambda: few
    features.STEPS = 2


if __name__ == "__main__":
    in_float64()
    on_few_digits()
    from gannorm import parallel
    from gannorm.training.loop import train

    with parallel.joined_processes(), parallel.failing_together():
        for is_end, run in groupby(sys.argv[1:], lambda word: word == "--"):
            if not is_end:
                folder, *overrides = run
                with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                    cfg = compose("config", overrides)
                train(cfg, Path(folder))
