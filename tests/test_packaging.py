"""gannorm.kernels from the source tree, a wheel and an editable install, beside `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

try:  # not imported nor looked for: either would change what distutils is for this process
    distribution("pip")
except PackageNotFoundError:
    pytest.skip("pip is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.*")}  # and the plans
OTHER = "MARK = 'the other project'\n"  # the file of another distribution named kernels
NOT_SOURCE = (
    ".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "multirun", "datasets", "venv",
)  # fmt: skip


def python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with `path` before this interpreter's packages, without its .pth files.

    An editable gannorm among them would otherwise answer in the place of the one under test.
    """
    ours = (ROOT, ROOT / "tests")
    own = [p for p in sys.path if p and Path(p).is_dir() and Path(p).resolve() not in ours]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *own])}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "--no-build-isolation"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a checkout has it: built in place, it would leave its build there."""
    target = tmp_path_factory.mktemp("copy") / "gannorm"
    ignore = shutil.ignore_patterns(*NOT_SOURCE)
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    if not (target / "README.md").exists():
        (target / "README.md").write_text("gannorm\n")
    return target


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of another project's distribution, named kernels."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(OTHER)
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'kernels'\nversion = '1.0'\n[tool.setuptools]\npackages = ['kernels']\n"
    )
    pip("wheel", folder, "-w", folder / "dist")
    (wheel,) = (folder / "dist").glob("kernels-1.0-*.whl")
    return wheel


BOTH = """
import gannorm, gannorm.kernels.launch, kernels, os
print(kernels.MARK)
print(os.path.realpath(gannorm.__file__))
print(os.path.realpath(gannorm.kernels.launch.__file__))
"""


def check_both(done: subprocess.CompletedProcess[str], target: Path, *ours: Path) -> None:
    """The other kernels and ours were imported, each from its place, and no file overwritten."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the other project", *(str(p.resolve()) for p in ours)]
    assert [p.name for p in (target / "kernels").iterdir() if p.suffix == ".py"] == ["__init__.py"]
    assert (target / "kernels" / "__init__.py").read_text() == OTHER


def test_the_source_tree(tmp_path: Path):
    done = python("import kernels", ROOT, ROOT)
    assert done.returncode != 0
    assert "ImportError: import this package as gannorm.kernels, not as kernels" in done.stderr
    done = python("from gannorm import kernels; print(kernels.__name__)", tmp_path, ROOT)
    assert done.stdout == "gannorm.kernels\n", done.stderr


@pytest.mark.slow
def test_a_wheel(copy: Path, other: Path, tmp_path: Path):
    pip("wheel", copy, "-w", tmp_path)
    (wheel,) = tmp_path.glob("gannorm-*.whl")
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    needed = re.findall(r"^Requires-Dist: (\w+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert needed == ["torch", "triton"]  # the rest is for training
    assert {
        name.removeprefix("gannorm/kernels/") for name in names if "/kernels/" in name
    } == KERNELS
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gannorm"}
    ours = {p.relative_to(copy).as_posix() for p in (copy / "gannorm").rglob("*.py")}
    assert ours <= names and any(name.endswith("licenses/LICENSE") for name in names)

    target = tmp_path / "target"
    pip("install", "--target", target, wheel, other)
    package = target / "gannorm"
    done = python(BOTH, tmp_path, target)
    check_both(done, target, package / "__init__.py", package / "kernels" / "launch.py")


def test_an_editable_install(copy: Path, other: Path, tmp_path: Path):
    target = tmp_path / "target"
    pip("install", "--target", target, other, "-e", copy)
    # Its .pth files want reading; on the path too, for the finder that they name is found there.
    done = python(f"import site; site.addsitedir({str(target)!r})\n{BOTH}", tmp_path, target)
    check_both(done, target, copy / "gannorm" / "__init__.py", copy / "kernels" / "launch.py")
