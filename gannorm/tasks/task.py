"""What both tasks share: networks, their averages, optimizers, mixed precision, their state."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gannorm.config import Config
from gannorm.data import Batch, Data
from gannorm.diagnostics.faults import Probe, measure, norm_faults, sample_faults
from gannorm.diagnostics.norm_layers import gaps, norm_layers
from gannorm.errors import RequestError
from gannorm.metrics.evaluation import Judged, Reference
from gannorm.metrics.standing import renew_statistics
from gannorm.norms.backend import check_backend, use_backend
from gannorm.tasks.augment import diff_augment
from gannorm.tasks.losses import Judge, discriminator_objective, is_penalized, judged_right

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(ABC):
    """One kind of GAN training.

    Attributes:
        generators, discriminators: by name; `averaged` holds the generators' EMA.
        optimizers: "G" for all generators, "D" for all discriminators.
        batches_per_step: how many batches `train_step` takes.
        references: the real images of each domain, for the figures; none without labels.
    """

    admitted_norms: tuple[str, ...]
    refusal = ""  # why the other norms cannot work
    batches_per_step = 1
    references: list[Reference]

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
    def _build(self, spectral: bool = True) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """Generators and discriminators; spectral norms, which take 15 power iterations each to
        begin with and change no shape, may be left out."""

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
        """Make the references, and keep what `evaluate` and `samples` show the generators."""

    @abstractmethod
    def judge(self, generators: dict[str, nn.Module], brief: bool) -> Judged:
        """Sample quality of generators in evaluation mode; a single class's as NAME/CLASS.

        brief: without the figures that cost passes of their own.
        """

    @abstractmethod
    def standing_forwards(self, name: str, net: nn.Module, count: int) -> list[Callable[[], Any]]:
        """`count` forward passes of generator `name`, each on another batch of training size."""

    @abstractmethod
    def reference_figures(self) -> dict[str, float]:
        """What the figures are to be held against, as FIGURE_real etc.; computed once."""

    @abstractmethod
    def probes(self) -> dict[str, Probe]:
        """Images of the averaged generators for the diagnostics, by name ("" or "_AtoB")."""

    @abstractmethod
    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """Named image batches (N, C, H, W) to show, and how many stand in a row."""

    @abstractmethod
    def pictures(self) -> dict[str, tuple[Tensor, int]]:
        """More of them, shown at evaluations: interpolations, the nearest training images."""

    # ---- what they share

    @torch.no_grad()
    def diagnose(self) -> tuple[dict[str, float], dict[str, str]]:
        """Figures of the samples and the norms, and the faults in them by name."""
        with gaps(self.averaged) as found:
            figures = measure(self.probes())
        faults = sample_faults(figures)
        faults |= norm_faults({**self.averaged, **self.discriminators}, found)
        if found:
            figures["probe/norm_gap"] = max(found.values())
        return figures, faults

    def _check_shapes(self) -> None:
        """Refuse sizes that the layers refuse, before anything is built or loaded."""
        try:
            with torch.device("meta"), torch.no_grad():
                self._dry_run(*self._build(spectral=False))
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

    def norm_inputs(self) -> dict[str, torch.Size]:
        """The shape of every norm layer's input while training, by "network.layer"."""
        shapes: dict[str, torch.Size] = {}
        with torch.device("meta"), torch.no_grad():
            nets = self._build(spectral=False)
            for name, net in {**nets[0], **nets[1]}.items():
                for key, layer in norm_layers(net).items():
                    layer.register_forward_pre_hook(
                        lambda _, inputs, full=f"{name}.{key}": shapes.update(
                            {full: inputs[0].shape}
                        )
                    )
            self._dry_run(*nets)
        return shapes

    def _optimizer(self, nets: dict[str, nn.Module], lr: float) -> torch.optim.Optimizer:
        parameters = [p for net in nets.values() for p in net.parameters()]
        betas = (self.cfg.optim.beta1, self.cfg.optim.beta2)
        fused = self.device.type in ("cuda", "cpu")
        return torch.optim.Adam(parameters, lr, betas, fused=fused)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.dtype is not torch.float32
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

    def _augment(self, images: Tensor) -> Tensor:
        """Images as the discriminators see them."""
        return diff_augment(images, [each.name for each in self.cfg.loss.diffaugment])

    def _train_discriminators(
        self, sides: Mapping[str, tuple[Judge, Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """One step of the discriminators, each by name with its (judge, real, fake).

        Returns losses, mean logits, and the shares of real and fake that were judged right.
        """
        cfg, figures, total = self.cfg.loss, {}, torch.zeros((), device=self.device)
        penalized = is_penalized(cfg)
        with self.autocast(not penalized):  # a penalty differentiates through all of it
            for name, (judge, real, fake) in sides.items():
                loss, penalty, logits = discriminator_objective(judge, real, fake, cfg)
                total = total + loss + penalty
                figures[name] = loss
                if penalized:
                    figures[f"{name}_penalty"] = penalty
                for side, values in zip(("real", "fake"), logits, strict=True):
                    figures[f"{name}_{side}"] = values.float().mean()
                for side, share in judged_right(*logits, cfg.gan.name).items():
                    figures[f"balance/{name}_{side}_right"] = share
        figures["balance/gradient_D"] = self._descend("D", total)
        return figures

    def _descend(self, name: str, loss: Tensor) -> Tensor:
        """One step of optimizer `name` down `loss`'s gradient, whose norm it returns.

        A gradient that is not finite changes no weight: the step that produced it can be run
        again, to see where.
        """
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        nets = (self.generators if name == "G" else self.discriminators).values()
        gradients = [[p.grad for p in net.parameters() if p.grad is not None] for net in nets]
        norms = [nn.utils.get_total_norm(each) for each in gradients]
        clip = self.cfg.optim.clip_norm
        if clip is not None:
            for net, norm in zip(nets, norms, strict=True):
                nn.utils.clip_grads_with_norm_(net.parameters(), clip, norm)
        total = torch.stack(norms).norm()
        if not self.scaler.is_enabled():  # which sets this itself, for the fused Adam
            vars(optimizer)["found_inf"] = (~total.isfinite()).float()
        self.scaler.step(optimizer)
        self.scaler.update()
        return total

    def _freeze_discriminators(self, frozen: bool) -> None:
        for net in self.discriminators.values():
            net.requires_grad_(not frozen)

    @torch.no_grad()
    def evaluate(self, generators: dict[str, nn.Module], brief: bool = False) -> Judged:
        """Copies of `generators`, trained or averaged, judged; they themselves stay as they are."""
        copies = {name: copy.deepcopy(net).eval() for name, net in generators.items()}
        count = self.cfg.metrics.standing_batches
        for name, net in copies.items():
            renew_statistics(net, self.standing_forwards(name, net, count))
        return self.judge(copies, brief)

    def protocol(self) -> dict[str, Any]:
        """How the figures came about: written beside them."""
        made: dict[str, Any] = {"extractor": "none: embedded needs labels to be trained on"}
        if self.references:
            found = [reference.protocol() for reference in self.references]
            made = found[0] if len(found) == 1 else dict(zip("AB", found, strict=True))
        return {
            "data": self.cfg.data.name,
            "image_size": self.cfg.data.image_size,
            "seed": self.cfg.seed,
            "standing_batches": self.cfg.metrics.standing_batches,
            **made,
        }

    @torch.no_grad()
    def update_averages(self, step: int) -> None:
        """Move the averaged generators, buffers too, towards the trained ones.

        The decay grows to `optim.ema_decay` (Karras et al., 2020, do alike), so that the average is
        one of the latest tenth of the steps at most: a longer one is of weights, and running
        statistics, that have little to do with the latest.
        """
        averaged = max(step - self.cfg.optim.ema_start, 0)
        decay = min(self.cfg.optim.ema_decay, averaged / (averaged + 10))
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
        if state["scaler"]:  # of another precision, it starts anew
            self.scaler.load_state_dict(state["scaler"])


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
