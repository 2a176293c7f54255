"""The kernels compile for every target, without a GPU: no spill, 16-byte accesses, none unused.
(A fifth of the cases for sm_90 by default; `-m slow` compiles all of them for all targets.)

The launchers run on meta tensors in a process of its own, without the interpreter, and Triton's
JIT believes in the target's GPU: arguments are specialized as in a real launch (alignment,
divisibility by 16, integers equal to 1), but nothing is launched.
"""

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# One element for each plane, set, sample or row. Whatever else a kernel takes moves 16 bytes at a
# time.
NARROW = {"weight_ptr", "bias_ptr", "labels_ptr", "mean_ptr", "var_ptr", "stats_ptr", "sums_ptr"}
NARROW |= {"partial_ptr", "means_ptr", "running_mean_ptr", "running_var_ptr"}
NARROW |= {"dweight_ptr", "dbias_ptr", "moments_ptr", "everyone_ptr", "totals_ptr"}
# Accesses of less than 16 bytes that are meant to be, at most this many: (kernel, argument).
FEW = {
    (kernel, "x_ptr"): 2  # the first element of each set, which shifts its moments
    for kernel in (
        "persistent_forward_kernel", "looped_forward_kernel", "split_moments_kernel",
        "split_apply_kernel",
    )
}  # fmt: skip
SPILLED: dict[tuple[str, str], dict[str, int]] = {}
if triton.__version__ < "3.7":  # whose code is a little worse
    FEW["persistent_forward_kernel", "x_ptr"] = 8
    case = "groups=0 (64, 256, 16, 16) torch.float32 {'activation': 'relu', 'labels': True}"
    SPILLED["persistent_backward_kernel", case] = {"STACK": 56}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# Groups of channels (0: statistics across the batch) and the published shapes.
INSTANCE = [(c, (8, c, s, s)) for c, s in ((64, 256), (128, 128), (256, 64))]
BATCH = [(0, (64, c, s, s)) for c, s in ((1024, 4), (512, 8), (256, 16), (128, 32), (64, 64))]
GROUP = [(32, (32, 256, 56, 56))]
INTEGERS = [(1, (1, 1, 1, 1)), (0, (1, 1, 1, 1)), (0, (3, 5, 7, 1))]  # equal to 1, or prime
MIDDLE = BATCH[2]
RELU = {"activation": "relu"}
LABELS = {**RELU, "labels": True}
SILU = {"activation": "silu", "residual": True, "labels": True}
BLOCK = {"residual": True, "affine": False}  # the CycleGAN block
AFTER = {"activation": "leaky_relu", "residual": True, "residual_after_activation": True}
CASES = [
    *((s, d, RELU) for s in INSTANCE for d in (F32, BF16)),
    *((s, BF16, BLOCK) for s in INSTANCE),
    *((s, F32, SILU) for s in GROUP),
    *((s, F32, LABELS) for s in BATCH),
    (BATCH[0], BF16, LABELS),
    (MIDDLE, F64, SILU),
    (MIDDLE, F32, {**AFTER, "given": True}),
    *((s, F32, {**LABELS, "last": True}) for s in BATCH),
    (BATCH[1], BF16, {**LABELS, "last": True}),
    *((s, F32, {**RELU, "last": True}) for s in (INSTANCE[2], *GROUP)),
    *((s, F32, {**LABELS, "together": True}) for s in (BATCH[0], MIDDLE)),
    (MIDDLE, F64, {**SILU, "together": True}),
    (BATCH[4], BF16, {**LABELS, "last": True, "together": True}),
]
# For one target, and always: these break before the code is made.
ONCE = [(s, F32, RELU) for s in INTEGERS]
ONCE += [(s, F32, {**RELU, "together": True}) for s in INTEGERS[1:]]


def _launch(groups, shape, dtype, e):
    """Forward and backward of one case, through the launchers."""
    from gannorm import kernels
    from gannorm.norms.composed import NormSpec, stat_dtype

    meta = partial(torch.empty, device="meta", dtype=dtype)
    n, c = shape[:2]
    activation, after = e.get("activation"), e.get("residual_after_activation", False)
    spec = NormSpec(groups, 1e-5, activation, 0.2, after)
    x = meta(n, c, shape[2] * shape[3])
    if e.get("last"):
        x = meta(n, shape[2] * shape[3], c).transpose(1, 2)
    table = meta(10 if e.get("labels") else 1, c) if e.get("affine", True) else None
    labels = meta(n, dtype=torch.int64) if e.get("labels") else None
    residual = torch.empty_like(x) if e.get("residual") else None
    given = e.get("given", False)
    buffer = meta(c, dtype=stat_dtype(dtype))
    inner = residual if activation and not after else None
    if e.get("together"):
        parts = kernels.parts((x, table, table, labels, residual, buffer, buffer), spec)
        everyone = parts.moments(x).expand(2, -1).contiguous()
        stats, _ = parts.merge(everyone, (buffer, buffer, 0.1, 1.0), 1e-5, buffer.dtype, True)
        parts.apply(x, table, table, labels, residual, stats, spec)
        totals, finish = parts.sums(x, x, table, table, labels, inner, stats, spec)
        finish(totals)
        return
    running = None if given or groups else (buffer, buffer, 0.1, 1.0)
    _, stats = kernels.forward(
        x, table, table, labels, residual, (buffer, buffer) if given else None, spec, running
    )
    kernels.backward(x, x, table, table, labels, inner, stats, spec, given, True)


def _launch_padding(dtype, layout):
    from gannorm.kernels import pad

    x = torch.empty(2, 64, 32, 32, dtype=dtype, device="meta").to(memory_format=layout)
    pad.backward(pad.forward(x, (3, 3)), (3, 3))


def _accesses(llir: str, names: list[str]) -> list[tuple[str, int]]:
    """Kernel argument and width in bytes of every access to global memory."""
    size = {"i8": 1, "half": 2, "bfloat": 2, "i16": 2, "float": 4, "i32": 4, "double": 8, "i64": 8}
    pointer = r"ptr(?: addrspace\(\d\))?(?: (?:noundef|nonnull|readonly|align \d+))* (%[\w.]+)"
    define = next(line for line in llir.splitlines() if line.startswith("define"))
    assert re.findall(r" (%\d+)[,)]", define)[: len(names)] == [f"%{i}" for i in range(len(names))]
    base = {f"%{i}": {name} for i, name in enumerate(names)}  # argument(s) behind each pointer
    found = []
    for line in llir.splitlines():
        if "ptr" not in line or line.startswith(("define", "declare")):
            continue
        behind = set[str]().union(
            *(
                base.get(p, ())
                for p in re.findall(pointer, line) + re.findall(r"\[ (%[\w.]+),", line)
            )
        )
        if match := re.match(
            r" *(%[\w.]+) = (?:getelementptr|phi ptr|select|.*make\.buffer)", line
        ):
            base[match[1]] = behind
        elif inline := re.search(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfu](\d+)", line):
            (name,) = behind or {"?"}  # a pointer that a loop carries as an integer
            found.append((name, int(inline[1] or 1) * int(inline[2]) // 8))
        elif behind and re.search(r"\b(load|store)\b", line):
            kind = re.search(r"(?:<(\d+) x )?\b(i8|half|bfloat|i16|float|i32|double|i64)\b", line)
            (name,) = behind
            found.append((name, int(kind[1] or 1) * size[kind[2]]))
    return found


def _products_less_themselves(ttir: str) -> list[str]:
    products = set(re.findall(r"(%\w+) = arith\.mulf", ttir))
    return [v for v in re.findall(r"subf (%\w+), \1\b", ttir) if v in products]


def _spill(kernel) -> dict[str, int]:
    """Every number that is not 0 where nothing lives outside the registers."""
    from triton import knobs

    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        # Spilled scalars lie in lanes of vector registers, while the private segment is empty.
        pattern = r"\.(vgpr_spill_count|private_segment_fixed_size): +(\d+)"
    else:
        path = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        pattern = r"\b(STACK|LOCAL):(\d+)"
    numbers = dict(re.findall(pattern, text))
    assert len(numbers) in (2, 3), text
    return {k: int(v) for k, v in numbers.items() if int(v)}


def _entry_points() -> list[str]:
    """The kernels that no other calls."""
    from triton.runtime.jit import JITFunction

    functions = {}
    package = importlib.import_module("gannorm.kernels")
    for info in pkgutil.walk_packages(package.__path__, "gannorm.kernels."):
        module = importlib.import_module(info.name)
        functions |= {k: v for k, v in vars(module).items() if isinstance(v, JITFunction)}
    called = {
        node.id
        for f in functions.values()
        for node in ast.walk(ast.parse(f.src))
        if isinstance(node, ast.Name)
    }
    return sorted(functions.keys() - called)


def _compile_all(target: str, every: int) -> dict:
    """Compile each `every`th case for one target: what each kernel accesses and spills."""
    from triton import CompilationError
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget(*TARGETS[target])

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    results, errors, seen = [], [], set()  # the JIT keeps the kernels: ids stay unique

    def compile_only(self, grid):
        def launch(*args, **kwargs):
            try:
                kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            except CompilationError as error:
                errors.append((self.fn.__name__, case, str(error)[-300:]))
                return
            if id(kernel) in seen:
                return
            seen.add(id(kernel))
            names = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
            accesses = _accesses(kernel.asm["llir"], names)
            amd = kernel.asm.get("amdgcn")
            results.append(
                {
                    "kernel": self.fn.__name__,
                    "case": case,
                    "aligned": aligned,
                    "arguments": [n for n in names if n.endswith("_ptr")],
                    "accesses": accesses,
                    "wide": amd and len(re.findall(r"(?:load|store)_dwordx4", amd)),
                    "spill": _spill(kernel),
                    "of_itself": _products_less_themselves(kernel.asm["ttir"]),
                }
            )

        return launch

    JITFunction.__getitem__ = compile_only
    driver.set_active(Driver())
    for (groups, shape), dtype, e in CASES[::every] + (ONCE if target == "sm_90" else []):
        case = f"groups={groups} {shape} {dtype} {e}"
        # The channels of a group are too few to be read 16 bytes at a time where they lie.
        few = e.get("last") and groups not in (0, shape[1])
        aligned = shape[2] * shape[3] % 16 == 0 and not few
        _launch(groups, shape, dtype, e)
    aligned = False  # a border's neighbours are read one by one
    for dtype, layout in product((F32, BF16, F64), (torch.contiguous_format, torch.channels_last)):
        case = f"padding {dtype} {layout}"
        _launch_padding(dtype, layout)
    return {"kernels": _entry_points(), "results": results, "errors": errors}


@pytest.fixture(
    scope="module",
    params=[("sm_90", 5), *(pytest.param((t, 1), marks=pytest.mark.slow) for t in TARGETS)],
    ids=lambda p: p[0] if p[1] == 1 else f"a part for {p[0]}",
)
def compiled(request, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    code = (
        "import json, sys, test_compile\n"
        "json.dump(test_compile._compile_all(sys.argv[1], int(sys.argv[2])), "
        "open(sys.argv[3], 'w'))"
    )
    out = folder / "compiled.json"
    command = [sys.executable, "-c", code, *map(str, request.param), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(out.read_text())


def test_every_kernel_is_compiled(compiled):
    """A kernel is a jit function that no other one calls: one that no plan uses stands out."""
    assert not compiled["errors"]
    assert sorted({r["kernel"] for r in compiled["results"]}) == compiled["kernels"]


def test_no_spill(compiled):
    results = compiled["results"]
    found = {(r["kernel"], r["case"]): r["spill"] for r in results if r["spill"]}
    assert found == {key: spill for key, spill in SPILLED.items() if key in found}


def test_no_product_is_subtracted_from_itself(compiled):
    """Fused multiply-adds make a * b - a * b its rounding error, and no longer a test for NaN."""
    assert not [r["kernel"] for r in compiled["results"] if r["of_itself"]]


def test_accesses_are_wide(compiled):
    bad = []
    for r in compiled["results"]:
        if not r["aligned"]:
            continue
        for name in set(r["arguments"]) - NARROW:
            if name == "x_ptr" and r["kernel"] in ("split_merge_kernel", "own_moments_kernel"):
                continue  # the first elements alone
            widths = [w for n, w in r["accesses"] if n == name]
            narrow = [w for w in widths if w < 16]
            if len(narrow) > FEW.get((r["kernel"], name), 0) or len(narrow) == len(widths):
                bad.append((r["kernel"], name, widths, r["case"]))
        wide = sum(w >= 16 for _, w in r["accesses"])
        if r["wide"] is not None and r["wide"] < wide:  # split after the LLVM IR
            bad.append((r["kernel"], "assembly", r["wide"], wide, r["case"]))
    assert not bad, "\n".join(map(str, bad))
