"""What works where only torch and Triton are installed, and what the commands say there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gannorm.errors import answering_requests

ROOT = Path(__file__).resolve().parents[1]
TRAIN = {
    "PIL", "antlr4", "hydra", "matplotlib", "omegaconf", "pydantic", "sklearn", "tensorboard",
    "safetensors", "threadpoolctl", "torchmetrics", "torchvision", "tqdm", "yaml",
}  # fmt: skip
NORM_TESTS = (
    "autograd", "batch_norm", "checks", "compile", "convert", "functional", "inputs",
    "cpu", "instance_norm", "launch", "layers", "norm_gaps", "ops", "runner",
)  # fmt: skip
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def without(names: set[str], code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(names=names) + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


NORMS_ALONE = """
import torch
before = set(sys.modules)
import gannorm
new = {name.split(".")[0] for name in set(sys.modules) - before}
x = torch.randn(2, 4, 3, 3)
print(tuple(gannorm.InstanceNorm2d(4, activation="relu")(x).shape), hasattr(gannorm, "no_such"))
print(sorted(new - set(sys.stdlib_module_names)))
"""


def test_import_gannorm_brings_in_nothing_but_torch():
    done = without(TRAIN, NORMS_ALONE)
    assert done.stdout == "(2, 4, 3, 3) False\n['gannorm']\n", done.stderr


def test_the_benchmarks_of_the_norms_need_no_hydra():
    code = (
        "from benchmarks import host, norms, tune\n"
        "from benchmarks.gpu import __main__, checks, right, stages, table"
    )
    done = without(TRAIN - {"tqdm"}, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_norms_tests_need_torch_and_triton_alone():
    """All are collected; those of `convert` and a few of each norm run."""
    files = [f"tests/test_{name}.py" for name in NORM_TESTS]
    few = "test_convert or one_value_per_channel or conditional_equals or test_weight_init"
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-p", "no:hydra_pytest", "-k", few]
    code = f"import pytest; sys.exit(pytest.main({[*options, *files]}))"
    done = without(TRAIN, code)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 40, done.stdout


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "start",
    [
        "sys.argv = ['train.py', 'norm=batch']; runpy.run_path('train.py', run_name='__main__')",
        "sys.argv = ['gannorm', 'inspect']; runpy.run_module('gannorm', run_name='__main__')",
        "sys.argv = ['study']; runpy.run_module('gannorm.study', run_name='__main__')",
    ],
)
def test_a_command_without_the_extra_names_it(start: str):
    done = without(TRAIN, start)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r'error: \w+ is not installed; .* pip install -e "\.\[train\]"', line)


def test_a_missing_module_of_our_own_is_a_failure():
    with pytest.raises(ModuleNotFoundError), answering_requests():
        importlib.import_module("gannorm.no_such")
