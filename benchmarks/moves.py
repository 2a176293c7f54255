"""Count the bytes that the kernels move, without a GPU.

    python -m benchmarks.moves

Triton's interpreter runs the kernels, and every load and store counts: the lanes that its mask
lets through, times the size of an element; statistics, sums and per-class gradients too. So do
the reads and writes of torch's own operations around the kernels (copies, zeros). One move is one
read or one write of the whole activation. Floors: `benchmarks.cases.Case.floor`. A set is what
shares a mean.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks import cases, timing
from benchmarks.cases import Case, Shape
from gannorm import use_backend
from gannorm.norms import composed


class Moves(NamedTuple):
    """Moves of the whole activation, by the kernels and torch's operations together.

    One kernel each way holds a set; two read it twice.
    """

    forward: float
    backward: float
    forward_kernels: int
    backward_kernels: int


class _TorchBytes(TorchDispatchMode):
    """Bytes that torch's operations read and write; views and allocations move none."""

    def __init__(self, add: Callable[[int], None]) -> None:
        super().__init__()
        self.add = add

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "empty" in name or name in ("detach", "alias", "set_"):
            return out
        read, written = _tensors([args, kwargs or {}]), _tensors(out)
        places = {t.untyped_storage().data_ptr() for t in read}
        mutable = func._schema.is_mutable
        if not mutable and any(t.untyped_storage().data_ptr() in places for t in written):
            return out  # a view
        if name in ("copy_", "zero_", "fill_", "normal_"):
            read = read[1:]
        elif name.endswith("_like") or name.startswith("new_"):
            read = []
        self.add(sum(map(_extent, read)) + sum(map(_extent, written)))
        return out


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    torch.utils._pytree.tree_map_only(torch.Tensor, found.append, values)
    return found


def _extent(t: torch.Tensor) -> int:
    """Bytes of different elements: an expanded one is read once."""
    sizes = (s for s, stride in zip(t.shape, t.stride(), strict=True) if stride or s == 0)
    return math.prod(sizes) * t.element_size()


@contextmanager
def counting() -> Iterator[list[int]]:
    """[bytes moved, kernels launched] inside the block so far."""
    from triton import knobs
    from triton.runtime import interpreter

    if not knobs.runtime.interpret:
        raise RuntimeError("moves are counted in Triton's interpreter: set TRITON_INTERPRET=1")
    total, inside = [0, 0], [False]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    add_atomic, swap, call = builder.create_atomic_rmw, builder.create_atomic_cas, executor.__call__

    def lanes(pointers: Any, mask: Any) -> int:
        bits = pointers.get_element_ty().primitive_bitwidth
        return int(mask.data.sum()) * max(1, bits // 8)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        total[0] += lanes(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        total[0] += lanes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        total[0] += 2 * lanes(pointers, mask)
        return add_atomic(self, op, pointers, value, mask, *rest)

    def counted_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        total[0] += 2 * pointers.data.size * (pointers.get_element_ty().primitive_bitwidth // 8)
        return swap(self, pointers, *rest)

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        total[1] += 1
        inside[0] = True  # the interpreter's own torch operations are none of the kernel's
        try:
            return call(self, *args, **options)
        finally:
            inside[0] = False

    def torch_bytes(moved: int) -> None:
        total[0] += 0 if inside[0] else moved

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw, builder.create_atomic_cas = counted_rmw, counted_swap
    executor.__call__ = launched
    recorded, composed.recorded = composed.recorded, lambda: False  # the mode only counts
    try:
        with _TorchBytes(torch_bytes):
            yield total
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, builder.create_atomic_cas = add_atomic, swap
        executor.__call__ = call
        composed.recorded = recorded


def count_moves(case: Case) -> Moves:
    """Moves of one forward and one backward of our kernels, interpreted on the CPU.

    The running statistics, a few operations on (C,), are left out of the case.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set before triton was imported.
    """
    t = cases.tensors(case, "cpu")
    t.running_mean = t.running_var = None
    leaves = list(t.leaves().values())
    with use_backend("triton"), counting() as total:
        y = cases.ours(case, t)
        forward, kernels = total
        torch.autograd.grad(y, leaves, t.dy)
    size = case.activation_bytes()
    return Moves(forward / size, (total[0] - forward) / size, kernels, total[1] - kernels)


def set_size(case: Case) -> int:
    """Elements that share a mean."""
    n, c, h, w = case.shape
    if case.op == "instance":
        return h * w
    return c // case.groups * h * w if case.op == "group" else n * h * w


def counted_cases(quick: bool) -> list[Case]:
    """Few planes of every kind."""
    planes: list[tuple[str, Shape, int]] = [
        ("instance", (1, 2, 32, 32), 0),
        ("instance", (1, 2, 64, 64), 0),
        ("instance", (1, 2, 128, 128), 0),
        ("instance", (1, 2, 256, 256), 0),
        ("conditional_batch", (64, 16, 4, 4), 0),
        ("conditional_batch", (64, 8, 8, 8), 0),
        ("conditional_batch", (64, 4, 16, 16), 0),
        ("conditional_batch", (16, 4, 32, 32), 0),
        ("conditional_batch", (16, 2, 64, 64), 0),
        ("group", (1, 8, 32, 32), 2),
        ("group", (1, 16, 56, 56), 2),
    ]
    if quick:
        planes = [("instance", (1, 2, 16, 16), 0), ("conditional_batch", (4, 2, 16, 16), 0)]
    found = []
    for op, shape, groups in planes:
        for e in ("none", "relu", "residual", "residual+relu"):
            for layout in ("nchw", "channels_last"):
                if layout == "nchw" or e in ("none", "residual+relu"):
                    found.append(Case(op, shape, e, "fp32", layout, groups))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moves", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for case in tqdm(counted_cases(args.quick), unit="case"):
        rows.append(
            {
                "name": str(case),
                "set": set_size(case),
                **count_moves(case)._asdict(),
                "forward_floor": case.floor("forward"),
                "backward_floor": case.floor("backward"),
            }
        )
    print(f"{'':62}forward              backward")
    print(f"{'case':54} {'set':>6}  {'moves kernels floor':20} {'moves kernels floor':20}")
    for row in rows:
        ways = (
            f"{row[way]:5.2f} {row[f'{way}_kernels']:7} {row[f'{way}_floor']:5}  "
            for way in ("forward", "backward")
        )
        print(f"{row['name']:54} {row['set']:6}  {' '.join(ways)}")
    if args.out is not None:
        timing.write(timing.environment("cpu") | {"moves": rows}, args.out)
    return 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":  # read at triton's first import
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.moves", *sys.argv[1:]],
                  environment)  # fmt: skip
    sys.exit(main())
