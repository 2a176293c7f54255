"""Imports point down only, every file has its floor, no file is long."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Lowest first (docs/design.md); a module's floor is that of the files below it too.
FLOORS = (
    ("gannorm.errors",),
    ("gannorm.config",),
    ("gannorm.kernels", "gannorm.reference"),
    ("gannorm.native",),
    ("gannorm.autograd", "gannorm.ops"),
    ("gannorm.backend", "gannorm.checks"),
    ("gannorm.functional", "gannorm.convolution"),
    (
        "gannorm.conversion",
        "gannorm.layers",
        "gannorm.norm_factory",
        "gannorm.norms",
        "gannorm",
    ),  # and what __init__ re-exports
    ("gannorm.augment", "gannorm.losses", "gannorm.models", "gannorm.norm_table"),
    ("gannorm.data",),
    ("gannorm.metrics", "gannorm.monitor", "gannorm.checkpoint", "gannorm.diagnostics"),
    ("gannorm.tasks",),
    ("gannorm.dashboard",),
    ("gannorm.trainer", "gannorm.inference", "gannorm.inspection", "gannorm.study"),
    ("gannorm.__main__", "train"),
)
LEVEL = {module: level for level, modules in enumerate(FLOORS) for module in modules}
LONGEST = 450


def sources() -> dict[str, Path]:
    """Every file of ours by the name it is imported as."""
    found = {"train": ROOT / "train.py"}
    for folder, name in (("gannorm", "gannorm"), ("kernels", "gannorm.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] != "kernels":  # the symlink; the files are read at the root
                found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imported(source: str, module: str, package: bool) -> set[str]:
    """The modules of ours that a source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: None if package and node.level == 1 else package - node.level]
            base = ".".join([*(up if node.level else ()), *([node.module] if node.module else ())])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & SOURCES.keys()
            if names - SOURCES.keys():  # something that stands in the module itself
                found.add(base)
    return {name for name in found if name.split(".")[0] in ("gannorm", "kernels", "train")}


def floor(module: str) -> str | None:
    """The table's entry for a module: its own, or its folder's."""
    name = module
    while name.count("."):
        if name in LEVEL:
            return name
        name = name.rpartition(".")[0]
    return module if module in LEVEL else None


def faults(source: str, module: str, package: bool = False) -> list[str]:
    here = floor(module)
    if here is None:
        return [f"{module} has no floor: give it one in FLOORS and in docs/design.md"]
    out = []
    for name in sorted(imported(source, module, package)):
        there = floor(name)
        if there is None:
            out.append(f"{module} imports {name}, which has no floor")
        elif here == "gannorm.kernels" != there:
            out.append(f"{module} imports {name}: kernels import nothing of ours but each other")
        elif LEVEL[there] > LEVEL[here]:
            out.append(f"{module} imports {name}, which stands above it")
    return out


def test_imports_point_down():
    found = []
    for module, path in SOURCES.items():
        found += faults(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_the_table_has_no_dead_entries():
    assert not {m for m in LEVEL if m not in SOURCES}


def test_upward_imports_are_found():
    upward = {
        "gannorm.reference": "from gannorm.norms import InstanceNorm2d",
        "gannorm.errors": "import gannorm.config",
        "gannorm.models.cyclegan": "def f():\n    from gannorm import tasks",
        "gannorm.data.digits": "if True:\n    import gannorm.trainer as t",
        "gannorm.functional": "import gannorm",
        "gannorm.autograd": "from . import functional",
        "gannorm.tasks.task": "from ..trainer import train",
        "gannorm.trainer": "import train",
        "gannorm.kernels.tile": "from gannorm.errors import RequestError",
    }
    for module, source in upward.items():
        assert len(faults(source, module)) == 1, module
    for package, source in (
        ("gannorm.data", "from ..trainer import x"),
        ("gannorm.models", "from gannorm.tasks import x"),
    ):
        assert len(faults(source, package, package=True)) == 1, package
    assert "has no floor" in faults("", "gannorm.utils")[0]
    downward = {
        "gannorm.trainer": "import gannorm\nfrom gannorm.tasks import Task",
        "gannorm.data.digits": "def f():\n    from gannorm.data import Data",
        "gannorm.functional": "from gannorm import kernels, reference",
        "gannorm.kernels.launch": "import torch\nfrom gannorm.kernels.tile import rsqrt",
    }
    for module, source in downward.items():
        assert not faults(source, module), module
    assert not faults("from .task import Task", "gannorm.tasks", package=True)


def test_no_file_is_long():
    ours = [*SOURCES.values(), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in ours}
    assert not {name: n for name, n in lengths.items() if n > LONGEST}
