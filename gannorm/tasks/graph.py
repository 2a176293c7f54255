"""`trainer.cuda_graph=true`: a training step is captured once in a CUDA graph, and replayed.

A replay launches all kernels of a step at once: the host's cost of thousands of launches is gone.
What a graph asks of a step is here: its images stand in buffers that stay, what the host draws
(the places of the image pools) is drawn before it and stands in one too, and the learning rates are
tensors (`Task._optimizer`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gannorm.data import Batch
from gannorm.tasks.task import Task

Step = Callable[[list[list[Batch]]], dict[str, Tensor]]
WARM_UP = 3  # steps before the capture: what is made once is made then


class GraphedStep:
    """`task.train_step`, replayed. Its first steps, until the pools are full, are eager ones.

    Holds the addresses of the task's state: of another state, as `load_state_dict` makes it, there
    must be another one of these.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.cuda = task, task.device.type == "cuda"
        self.taken: list[list[Batch]] = []
        self.choices: list[Tensor] = []
        self.steps = 0
        self.graph: Any = None
        self.stream = torch.cuda.Stream() if self.cuda else None  # each keeps memory of its own
        self.names: list[str] = []
        self.values = torch.empty(0)

    def __call__(self, taken: list[list[Batch]]) -> dict[str, Tensor]:
        self._take(taken)
        if self.graph is None and not self._is_warm():
            self.steps += 1
            return self._eager()
        self._draw()
        if self.graph is None:
            self._capture()
        if self.cuda:
            self.graph.replay()
        else:  # the same function, of the same buffers
            self._run()
        # The graph's own values are the next step's soon.
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))

    def _is_warm(self) -> bool:
        return self.steps >= WARM_UP and self.task.is_settled()

    def _eager(self) -> dict[str, Tensor]:
        stream = self.stream  # as a capture's: what autograd keeps is another stream's
        if stream is None:
            return self.task.train_step(self.taken)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            losses = self.task.train_step(self.taken)
        torch.cuda.current_stream().wait_stream(stream)
        return losses

    def _take(self, taken: list[list[Batch]]) -> None:
        """Into the buffers."""
        if not self.taken:
            self.taken = [
                [{name: self._buffer(value) for name, value in batch.items()} for batch in each]
                for each in taken
            ]
        for each, new in zip(self.taken, taken, strict=True):
            for buffers, batch in zip(each, new, strict=True):
                for name, buffer in buffers.items():
                    buffer.copy_(batch[name], non_blocking=True)

    def _buffer(self, value: Tensor) -> Tensor:
        is_image = value.dim() == 4
        buffer = torch.empty(value.shape, dtype=value.dtype, device=self.task.device)
        return buffer.contiguous(memory_format=self.task.memory_format) if is_image else buffer

    def _draw(self) -> None:
        """What the step asks the host, into buffers."""
        drawn = self.task.choices()
        if not self.choices:
            self.choices = [each.to(self.task.device) for each in drawn]
        for buffer, each in zip(self.choices, drawn, strict=True):
            buffer.copy_(each, non_blocking=True)

    def _run(self) -> None:
        with self.task.choosing(self.choices):
            losses = self.task.train_step(self.taken)
        self.names = list(losses)
        self.values = torch.stack([value.float() for value in losses.values()])

    def _capture(self) -> None:
        if not self.cuda:
            self.graph = self._run
            return
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread's mistakes: the loader's may pin memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._run()
