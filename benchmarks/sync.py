"""What it costs a batch norm to share its statistics: 2 processes beside one with the whole batch.

    python -m benchmarks.sync

Forward and backward of conditional batch norm with a ReLU (a batch of 32 x 128 x 16 x 16) in three
ways: one process of two threads; two processes (gloo) of one thread, half of the batch each, on
their own; and the same two sharing statistics. They take turns of ten calls, which the processes
begin together.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

import gannorm
from benchmarks import timing

CALLS = 10  # of a turn: a barrier lets one go milliseconds before the other
SHAPE = (32, 128, 16, 16)
WAYS = {"whole": None, "apart": None, "shared": "world"}


def step(norm: gannorm.ConditionalBatchNorm2d, x: torch.Tensor, labels: torch.Tensor) -> None:
    y = norm(x, labels)
    y.backward(y.detach())


def work(rank: int, folder: str, rounds: int) -> None:
    """Rank 0 leaves the medians, in microseconds, in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, labels = torch.randn(SHAPE), torch.randint(10, SHAPE[:1])
    half = slice(0, 16) if rank == 0 else slice(16, 32)
    norm = gannorm.ConditionalBatchNorm2d(SHAPE[1], 10, activation="relu")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 3):
        for way, group in WAYS.items():
            part = slice(None) if way == "whole" else half
            torch.set_num_threads(2 if way == "whole" else 1)
            norm.process_group = group
            inputs = x[part].clone().requires_grad_(), labels[part]
            dist.barrier()
            began = time.perf_counter()
            if rank == 0 or way != "whole":
                for _ in range(CALLS):
                    step(norm, *inputs)
            if turn >= 3:
                times[way].append(1e6 * (time.perf_counter() - began) / CALLS)
            dist.barrier()  # who waits leaves the cores to the others
    if rank == 0:
        row = {f"{way}_us": round(median(each), 1) for way, each in times.items()}
        timing.write(row, Path(folder) / "row.json")
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sync", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    result: dict[str, Any] = timing.environment("cpu") | {"input": list(SHAPE)}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, args.rounds), 2)
        result |= timing.read(Path(folder) / "row.json")
    print(f"{SHAPE}: one process {result['whole_us']} us; two, half each: on their own "
          f"{result['apart_us']} us, sharing statistics {result['shared_us']} us")  # fmt: skip
    timing.write(result, timing.result_path(result, args.out, "sync-"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
