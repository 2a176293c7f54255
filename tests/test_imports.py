"""The norms, and the benchmarks of them, where Hydra is not installed."""

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
import gannorm
from benchmarks import host, norms, tune
from benchmarks.gpu import __main__, checks, right, stages, table
x = torch.randn(2, 4, 3, 3)
print(tuple(gannorm.InstanceNorm2d(4, activation="relu")(x).shape), hasattr(gannorm, "no_such"))
"""


def test_norms_need_no_hydra():
    command = [sys.executable, "-c", WITHOUT]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "(2, 4, 3, 3) False\n", done.stderr
