"""Imports point down only, every module has its floor, no file and no function is long."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 450, 60
SOURCES = [*ROOT.glob("gannorm/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "train.py"]
OTHERS = [*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/**/*.py")]


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    command += ["--no-cache", "--config", "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_point_down():
    done = linted(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("gannorm/norms/backend.py", "import gannorm.config", "norms is not allowed to import"),
        ("gannorm/models/cyclegan.py", "from gannorm import tasks", "models is not allowed to"),
        ("gannorm/data/digits.py", "def f():\n    import gannorm.training.loop", "data is not all"),
        ("kernels/tile.py", "from gannorm.errors import RequestError", "kernels is not allowed"),
        ("gannorm/utils.py", "", "gannorm.utils"),
        ("gannorm/data/images.py", "from gannorm.data import folders", "no circles BROKEN"),
    ],
)
def test_upward_imports_circles_and_strays_are_found(file, line, said, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=leave_out)
    shutil.copytree(ROOT / "gannorm", tmp_path / "gannorm", symlinks=True, ignore=leave_out)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr


def test_no_file_is_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines())
               for p in [*SOURCES, *OTHERS]}  # fmt: skip
    assert not {name: n for name, n in lengths.items() if n > LONGEST_FILE}


def test_no_function_is_long():
    found = {}
    for path in [*SOURCES, *OTHERS]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                found[f"{path.relative_to(ROOT)}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert not {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION}
