"""Where a run's figures and pictures go: TensorBoard, metrics.jsonl, PNG files.

Of a disk that takes nothing, training does not end: figures wait for it, pictures are left out.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gannorm.data.images import to_image
from gannorm.errors import RequestError, RunError
from gannorm.training.captions import sheet
from gannorm.training.folder import replacing, sync, writable
from gannorm.training.log import Log, Trouble, board

Captions = Callable[[str], tuple[Sequence[str], Sequence[str]]]


class Monitor:
    """Writes to a run folder. After a resume at step k whatever was logged beyond k goes.

    captions: by a picture's name, what is written beside its rows and above its columns.

    Raises:
        RequestError: the folder cannot be written to.
    """

    captions: Captions = staticmethod(lambda name: ((), ()))

    def __init__(self, run_dir: Path, start_step: int, again: bool = False) -> None:
        """again: step 0, where it starts there, was logged by this run."""
        self.run_dir, self.start_step = run_dir, start_step
        path, purge = run_dir / "metrics.jsonl", None
        self.told: dict[str, Any] = {}  # at the step that is gone on from
        self.tags: set[str] = set()  # of the scalars so far
        self.trouble = Trouble(f"pictures ({run_dir / 'samples'})", "without them")
        with writable(run_dir):
            for name in ("samples", "checkpoints"):  # not made later: see `replacing`
                (run_dir / name).mkdir(parents=True, exist_ok=True)
            for folder in (run_dir, run_dir.parent):
                with suppress(PermissionError):  # to read it
                    sync(folder)
            if path.exists():
                last = start_step if start_step or again else -1
                self.told = _drop_after(path, last)
                purge = last + 1
            self.file = Log(path, "figures")
            self.writer = board(run_dir, purge)

    def scalars(self, step: int, values: dict[str, float], **notes: Any) -> None:
        """One line of metrics.jsonl, with `notes` beside, and as many TensorBoard scalars."""
        self.tags |= values.keys()
        if step == self.start_step:  # a process that was killed here may have told them
            values = {k: v for k, v in values.items() if k not in self.told}
            if self.told and not values:
                return
            self.told |= values
        # The line first, which tells the next process: TensorBoard has no figure twice.
        self.file.write((json.dumps({"step": step, **values, **notes}) + "\n").encode())
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Onto the disk: before a checkpoint, so that none is ahead of its log."""
        self.writer.flush()
        self.file.sync()

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
        picture = to_image(torch.cat(columns_[:-1], 2))
        try:
            with replacing(path) as file:
                picture.save(file, format="PNG")
            self.trouble.ended()
        except OSError as error:
            self.trouble.failed(error)
        return path

    def restart(self, step: int) -> None:
        """As after a resume at `step`: whatever was logged beyond it goes.

        Raises:
            RunError: the disk does not let it go.
        """
        self.close()
        try:
            Monitor.__init__(self, self.run_dir, step, again=True)
        except RequestError as error:
            raise RunError(
                f"cannot go back to step {step}: {error}; or go on with resume={self.run_dir}"
            ) from error

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

    def flush(self) -> None:
        pass

    def text(self, name: str, markdown: str, step: int | None = None) -> None:
        pass

    def images(self, step: int, samples: dict[str, tuple[Tensor, int]]) -> Path:
        raise AssertionError("the first process shows images")

    def restart(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def _drop_after(path: Path, step: int) -> dict[str, Any]:
    """Keep the lines up to `step`; a last line cut short by a crash goes too.

    Returns what was told at `step` itself.
    """
    kept, told = [], dict[str, Any]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
            if found["step"] > step:
                continue
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        kept.append(line + "\n")
        if found["step"] == step:
            told |= found
    with replacing(path) as file:
        file.write("".join(kept).encode())
    return told
