"""Where a run's figures and pictures go: TensorBoard, metrics.jsonl, PNG files."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gannorm.data.images import to_image
from gannorm.training.captions import sheet

Captions = Callable[[str], tuple[Sequence[str], Sequence[str]]]


class Monitor:
    """Writes to a run folder. After a resume at step k whatever was logged beyond k goes.

    captions: by a picture's name, what is written beside its rows and above its columns.
    """

    captions: Captions = staticmethod(lambda name: ((), ()))

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.run_dir, self.start_step = run_dir, start_step
        (run_dir / "samples").mkdir(parents=True, exist_ok=True)
        path, purge = run_dir / "metrics.jsonl", None
        if path.exists():
            _drop_after(path, start_step or -1)
            purge = start_step + 1 if start_step else 0
        self.file = path.open("a", encoding="utf-8")
        self.tags: set[str] = set()  # of the scalars so far
        self.writer = SummaryWriter(str(run_dir), purge_step=purge, flush_secs=10)

    def scalars(self, step: int, values: dict[str, float], **notes: Any) -> None:
        """One line of metrics.jsonl, with `notes` beside, and as many TensorBoard scalars."""
        self.tags |= values.keys()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.file.write(json.dumps({"step": step, **values, **notes}) + "\n")
        self.file.flush()

    def text(self, name: str, markdown: str, step: int | None = None) -> None:
        self.writer.add_text(name, markdown, step)

    def grid(self, name: str, images: Tensor, columns: int, step: int) -> Tensor:
        """A batch (N, C, S, S) in rows of `columns` in TensorBoard: the picture (C, H, W)."""
        grid = sheet(images, columns, *self.captions(name))
        self.writer.add_image(name, (grid.clamp(-1, 1) + 1) / 2, step)
        return grid

    def images(self, step: int, samples: dict[str, tuple[Tensor, int]]) -> Path:
        """Each batch as a grid in TensorBoard, all of them side by side in one PNG: its path."""
        grids = [
            self.grid(f"samples/{name}", images, columns, step)
            for name, (images, columns) in samples.items()
        ]
        height = max(g.shape[1] for g in grids)
        gap = torch.ones(grids[0].shape[0], height, 16)
        columns_ = []
        for grid in grids:
            missing = height - grid.shape[1]
            columns_ += [torch.nn.functional.pad(grid, (0, 0, 0, missing), value=1.0), gap]
        path = self.run_dir / "samples" / f"step_{step:08d}.png"
        partial = path.with_suffix(".partial")
        to_image(torch.cat(columns_[:-1], 2)).save(partial, format="PNG")
        os.replace(partial, path)
        return path

    def close(self) -> None:
        self.writer.close()
        self.file.close()


class Silent(Monitor):
    """Of a process that does not write."""

    writer: Any = None

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.run_dir, self.start_step = run_dir, start_step
        self.tags = set()

    def scalars(self, step: int, values: dict[str, float], **notes: Any) -> None:
        pass

    def text(self, name: str, markdown: str, step: int | None = None) -> None:
        pass

    def images(self, step: int, samples: dict[str, tuple[Tensor, int]]) -> Path:
        raise AssertionError("the first process shows images")

    def close(self) -> None:
        pass


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`; a last line cut short by a crash goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (json.JSONDecodeError, KeyError):
            continue
        kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
