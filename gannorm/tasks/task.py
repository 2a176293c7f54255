"""What both tasks share: networks, their averages, optimizers, mixed precision, their state."""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gannorm.backend import check_backend, use_backend
from gannorm.config import Config
from gannorm.data import Batch, Data
from gannorm.errors import RequestError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(ABC):
    """One kind of GAN training.

    Attributes:
        generators, discriminators: by name; `averaged` holds the generators' EMA.
        optimizers: "G" for all generators, "D" for all discriminators.
        batches_per_step: how many batches `train_step` takes.
    """

    admitted_norms: tuple[str, ...]
    refusal = ""  # why the other norms cannot work
    batches_per_step = 1

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        if cfg.norm.name not in self.admitted_norms:
            raise RequestError(
                f"norm={cfg.norm.name} cannot work with model={cfg.model.name}: "
                f"{self.refusal}; choose norm= {', '.join(self.admitted_norms)}"
            )
        self.backend = cfg.norm.backend.name
        check_backend(self.backend)
        self.cfg, self.device, self.num_classes = cfg, device, num_classes
        self._check_shapes()
        self.generators, self.discriminators = self._build()
        for net in self.networks.values():
            net.to(device)
        self.averaged = {
            name: copy.deepcopy(net).eval().requires_grad_(False)
            for name, net in self.generators.items()
        }
        self.optimizers = {
            "G": self._optimizer(self.generators, cfg.optim.lr_g),
            "D": self._optimizer(self.discriminators, cfg.optim.lr_d),
        }
        fp16 = cfg.trainer.precision.name == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.dtype = PRECISIONS[cfg.trainer.precision.name]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {**self.generators, **self.discriminators}

    # ---- what each task defines

    @abstractmethod
    def _build(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """Generators and discriminators."""

    @abstractmethod
    def _dry_run(
        self, generators: dict[str, nn.Module], discriminators: dict[str, nn.Module]
    ) -> None:
        """One forward pass of everything at the training's shapes, on the meta device."""

    @abstractmethod
    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        """One step of the generators and `optim.d_steps` of the discriminators: the losses."""

    @abstractmethod
    def prepare_evaluation(self, data: Data) -> None:
        """Keep the held-out images and train the classifiers that `evaluate` uses."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Sample quality of the averaged generators."""

    @abstractmethod
    def reference_figures(self) -> dict[str, float]:
        """What `evaluate`'s figures are to be held against; computed once."""

    @abstractmethod
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """Named image batches (N, C, H, W) to show, and how many stand in a row."""

    # ---- what they share

    def _check_shapes(self) -> None:
        """Refuse sizes that the layers refuse, before anything is built or loaded."""
        try:
            with torch.device("meta"), torch.no_grad():
                self._dry_run(*self._build())
        except RequestError:
            raise
        except (ValueError, RuntimeError) as error:
            # The last way out that an op names, degenerate="beta", is none for a training run.
            reason = str(error).splitlines()[0].split(", or degenerate=")[0]
            cfg = self.cfg
            raise RequestError(
                f"norm={cfg.norm.name} with model={cfg.model.name} cannot run at "
                f"data.image_size={cfg.data.image_size}, data.batch_size={cfg.data.batch_size}: "
                f"{reason}"
            ) from error

    def _optimizer(self, nets: dict[str, nn.Module], lr: float) -> torch.optim.Optimizer:
        parameters = [p for net in nets.values() for p in net.parameters()]
        betas = (self.cfg.optim.beta1, self.cfg.optim.beta2)
        fused = self.device.type in ("cuda", "cpu")
        return torch.optim.Adam(parameters, lr, betas, fused=fused)

    def autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def norm_backend(self) -> Any:
        return use_backend(self.backend)

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Constant until `optim.decay_from`, then linear to 0 at the run's end."""
        optim, steps = self.cfg.optim, self.cfg.trainer.steps
        start = optim.decay_from * steps
        factor = 1.0 if step < start else (steps - step) / max(steps - start, 1)
        rates = {"G": optim.lr_g * factor, "D": optim.lr_d * factor}
        for name, rate in rates.items():
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate
        return rates

    def _descend(self, name: str, loss: Tensor) -> None:
        """One step of optimizer `name` down `loss`'s gradient."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        clip = self.cfg.optim.clip_norm
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nets = self.generators if name == "G" else self.discriminators
            for net in nets.values():
                nn.utils.clip_grad_norm_(net.parameters(), clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def _freeze_discriminators(self, frozen: bool) -> None:
        for net in self.discriminators.values():
            net.requires_grad_(not frozen)

    @torch.no_grad()
    def update_averages(self, step: int) -> None:
        """Move the averaged generators, buffers too, towards the trained ones."""
        decay = self.cfg.optim.ema_decay if step >= self.cfg.optim.ema_start else 0.0
        for name, net in self.generators.items():
            pairs = zip(_tensors(self.averaged[name]), _tensors(net), strict=True)
            floating = []
            for average, current in pairs:
                if average.is_floating_point():
                    floating.append((average, current))
                else:
                    average.copy_(current)
            averages, currents = ([t for t in side] for side in zip(*floating, strict=True))
            torch._foreach_lerp_(averages, currents, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training, as tensors and plain values."""
        return {
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "averaged": {name: net.state_dict() for name, net in self.averaged.items()},
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, net in self.networks.items():
            net.load_state_dict(state["networks"][name])
        for name, net in self.averaged.items():
            net.load_state_dict(state["averaged"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
