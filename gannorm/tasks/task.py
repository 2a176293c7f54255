"""What trains: networks, their averages, optimizers, mixed precision, one step, their state."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gannorm import parallel
from gannorm.data import Batch
from gannorm.diagnostics.norm_layers import norm_layers
from gannorm.errors import RequestError
from gannorm.models.norm_factory import NORMS, Norm
from gannorm.models.spectral import by_hand
from gannorm.norms.backend import check_backend, use_backend
from gannorm.norms.convert import convert_sync
from gannorm.schema import Config, TrainerConfig
from gannorm.tasks.augment import diff_augment
from gannorm.tasks.losses import (
    LOSSES,
    Critic,
    discriminator_accuracy,
    discriminator_objective,
    is_penalized,
)

PRECISIONS = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
Networks = dict[str, nn.Module]
Sides = Mapping[str, tuple[Critic, Tensor, Tensor]]  # by discriminator: critic, real, fake


class Task(ABC):
    """One kind of GAN training.

    Attributes:
        generators, discriminators: by name; `averaged` holds the generators' EMA.
        optimizers: "G" for all generators, "D" for all discriminators.
        batches_per_step: how many batches `train_step` takes.
        class_names: what people see in the place of the labels; their numbers where there are none.
    """

    takes_labels = False  # where its data has them
    batches_per_step = 1

    def __init__(self, cfg: Config, device: torch.device, num_classes: int | None) -> None:
        self.cfg, self.device, self.num_classes = cfg, device, num_classes
        self.parts = cfg.trainer.grad_accum  # of a batch that an optimizer step takes
        self.memory_format = memory_format(cfg.trainer, device)
        self.class_names = [str(k) for k in range(num_classes or 0)]
        self._check_request()
        self.backend = cfg.norm.backend
        check_backend(self.backend)
        self._check_shapes()
        self.generators, self.discriminators = self._build()
        for net in self.networks.values():
            net.to(device).to(memory_format=self.memory_format)
            if parallel.world() > 1:
                convert_sync(net)
        self.averaged = {
            name: copy.deepcopy(net).eval().requires_grad_(False)
            for name, net in self.generators.items()
        }
        if cfg.optim.ema_decay == 0:  # the average is the trained network: in the same memory
            for name, net in self.averaged.items():
                for average, trained in _pairs(net, self.generators[name]):
                    average.data = trained.data
        # By optimizer, for each network. Listing them anew costs 2 ms a step of small networks.
        both = {"G": self.generators.values(), "D": self.discriminators.values()}
        self.trained = {
            name: [[p for p in net.parameters() if p.requires_grad] for net in nets]
            for name, nets in both.items()
        }
        # Spectral norms move once a step of their optimizer, however many passes it has.
        self.moves = {name: [by_hand(net) for net in nets] for name, nets in both.items()}
        self.optimizers = {
            "G": self._optimizer(self.generators, cfg.optim.lr_g),
            "D": self._optimizer(self.discriminators, cfg.optim.lr_d),
        }
        self._averaging: tuple[list[nn.Module], list[tuple[Tensor, Tensor]]] | None = None
        fp16 = cfg.trainer.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.dtype = PRECISIONS[cfg.trainer.precision]
        # Of a resumed run: the step that its schedule counts from, and the share of the rates that
        # it never rises above.
        self.schedule_start, self.schedule_cap = 0, 1.0
        self.halvings = 0  # of the rates, one for each rewind

    @property
    def networks(self) -> Networks:
        return {**self.generators, **self.discriminators}

    # ---- what each task defines

    @classmethod
    def refusal(cls, norm: Norm, cfg: Config) -> str:
        """With what a norm cannot work here, and why; or nothing."""
        return ""

    @abstractmethod
    def _build(self, spectral: bool = True) -> tuple[Networks, Networks]:
        """Generators and discriminators; spectral norms, which take 15 power iterations each to
        begin with and change no shape, may be left out."""

    @abstractmethod
    def _dry_run(self, generators: Networks, discriminators: Networks) -> None:
        """One forward pass of everything at the training's shapes, on the meta device."""

    @abstractmethod
    def train_step(self, batches: list[list[Batch]]) -> dict[str, Tensor]:
        """One step of the generators and `optim.d_steps` of the discriminators: the losses.

        Each takes `trainer.grad_accum` batches, whose gradients and losses are averaged.
        """

    # ---- what the host decides in a step (`gannorm.tasks.graph`)

    def is_settled(self) -> bool:
        """Whether all steps from here on are made of the same operations."""
        return True

    def choices(self) -> list[Tensor]:
        """What the next step asks the host, drawn now (on the CPU)."""
        return []

    def choosing(self, choices: list[Tensor]) -> AbstractContextManager[None]:
        """Inside, a step takes these."""
        return nullcontext()

    # ---- requests

    def _check_request(self) -> None:
        """Refuse a norm or a loss that cannot work."""
        cfg, loss = self.cfg, self.cfg.loss
        reason = self.refusal(NORMS[cfg.norm.name], cfg)
        if reason:
            fitting = [name for name, norm in NORMS.items() if not self.refusal(norm, cfg)]
            raise RequestError(
                f"norm={cfg.norm.name} cannot work with {reason}; choose norm= {', '.join(fitting)}"
            )
        if not LOSSES[loss.gan].bounded and not is_penalized(loss):
            raise RequestError(
                f"loss.gan={loss.gan} needs a bounded critic; set loss.gradient_penalty=10 "
                "(loss=wgan_gp)"
            )

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

    def _optimizer(self, nets: Networks, lr: float) -> torch.optim.Optimizer:
        parameters = [p for net in nets.values() for p in net.parameters()]
        betas = (self.cfg.optim.beta1, self.cfg.optim.beta2)
        fused = self.device.type in ("cuda", "cpu")
        if not self.cfg.trainer.cuda_graph:
            return torch.optim.Adam(parameters, lr, betas, fused=fused)
        # A graph reads its rate where it was captured.
        rate = torch.tensor(lr, device=self.device)
        on_gpu = self.device.type == "cuda"
        return torch.optim.Adam(parameters, rate, betas, fused=fused, capturable=on_gpu)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def on_device(self, images: Tensor) -> Tensor:
        """Where the networks are, and laid out as they are; the layout is changed over there."""
        moved = images.to(self.device, non_blocking=True)
        return moved.contiguous(memory_format=self.memory_format)

    def norm_backend(self) -> Any:
        return use_backend(self.backend)

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Constant until `optim.decay_from`, then falling to 0 at the run's end."""
        optim, first = self.cfg.optim, self.schedule_start
        done = step - first, self.cfg.trainer.steps - first
        factor = min(self.schedule_cap, scheduled(optim.schedule, optim.decay_from, *done))
        factor *= 0.5**self.halvings
        rates = {"G": optim.lr_g * factor, "D": optim.lr_d * factor}
        for name, rate in rates.items():
            for group in self.optimizers[name].param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        return rates

    def _augment(self, images: Tensor) -> Tensor:
        """Images as the discriminators see them."""
        batches = len(images) // self.cfg.data.batch_size
        return diff_augment(images, self.cfg.loss.diffaugment, batches)

    def _train_discriminators(self, parts: Iterable[Sides]) -> dict[str, Tensor]:
        """One step of the discriminators on the parts of a batch.

        Returns losses, mean logits, and the shares of real and fake that it told apart.
        """
        found: list[dict[str, Tensor]] = []
        gradient = self._descend("D", (self._judge(sides, found) for sides in parts))
        return averaged(found) | {"balance/gradient_D": gradient}

    def _judge(self, sides: Sides, found: list[dict[str, Tensor]]) -> Tensor:
        """What the discriminators minimize; their figures go to `found`."""
        cfg, figures, total = self.cfg.loss, {}, torch.zeros((), device=self.device)
        penalized = is_penalized(cfg)
        with self.autocast(not penalized):  # a penalty differentiates through all of it
            for name, (critic, real, fake) in sides.items():
                loss, penalty, logits = discriminator_objective(critic, real, fake, cfg)
                total = total + loss + penalty
                figures[name] = loss
                if penalized:
                    figures[f"{name}_penalty"] = penalty
                for side, values in zip(("real", "fake"), logits, strict=True):
                    figures[f"{name}_{side}"] = values.float().mean()
                for side, share in discriminator_accuracy(*logits, cfg.gan).items():
                    figures[f"balance/{name}_{side}_right"] = share
        found.append(figures)
        return total

    def _descend(self, name: str, losses: Iterable[Tensor]) -> Tensor:
        """One step of optimizer `name` down the gradient of the parts' mean loss, whose norm it
        returns. A part's graph is gone before the next one's is made.

        A gradient that is not finite changes no weight: the step that produced it can be run
        again, to see where.
        """
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        for move in self.moves[name]:
            move()
        for loss in losses:
            self.scaler.scale(loss / self.parts).backward()
        nets = self.trained[name]
        self._share_gradients([p for each in nets for p in each if p.grad is not None])
        self.scaler.unscale_(optimizer)
        gradients = [[p.grad for p in each if p.grad is not None] for each in nets]
        norms = [nn.utils.get_total_norm(each) for each in gradients]
        clip = self.cfg.optim.clip_norm
        if clip is not None:
            for each, norm in zip(nets, norms, strict=True):
                nn.utils.clip_grads_with_norm_(each, clip, norm)
        total = torch.stack(norms).norm()
        if not self.scaler.is_enabled():  # which sets this itself, for the fused Adam
            vars(optimizer)["found_inf"] = (~total.isfinite()).float()
        self.scaler.step(optimizer)
        self.scaler.update()
        return total

    @staticmethod
    def _share_gradients(parameters: list[nn.Parameter]) -> None:
        """Their gradients become the whole batch's."""
        means = parallel.means([p.grad for p in parameters if p.grad is not None])
        for parameter, mean in zip(parameters, means, strict=True):
            if parameter.grad is not mean:  # the fused Adam wants the parameter's layout
                parameter.grad = torch.empty_like(parameter).copy_(mean)

    def _freeze_discriminators(self, frozen: bool) -> None:
        for each in self.trained["D"]:
            for parameter in each:
                parameter.requires_grad_(not frozen)

    @torch.no_grad()
    def update_averages(self, step: int) -> None:
        """Move the averaged generators, buffers too, towards the trained ones.

        The decay grows to `optim.ema_decay` (Karras et al., 2020, do alike), so that the average is
        one of the latest tenth of the steps at most: a longer one is of weights, and running
        statistics, that have little to do with the latest.
        """
        if self.cfg.optim.ema_decay == 0:
            return
        averaged = max(step - self.cfg.optim.ema_start, 0)
        decay = min(self.cfg.optim.ema_decay, averaged / (averaged + 10))
        nets = [*self.averaged.values(), *self.generators.values()]
        if self._averaging is None or self._averaging[0] != nets:  # weights of others were taken
            both = [_pairs(self.averaged[name], net) for name, net in self.generators.items()]
            self._averaging = nets, [pair for pairs in both for pair in pairs]
        floating = []
        for average, current in self._averaging[1]:
            if average.is_floating_point():
                floating.append((average, current))
            else:
                average.copy_(current)
        averages, currents = ([t for t in side] for side in zip(*floating, strict=True))
        torch._foreach_lerp_(averages, currents, 1 - decay)

    def share_state(self) -> None:
        """What all processes begin with: the first one's networks."""
        nets = [*self.networks.values(), *self.averaged.values()]
        parallel.broadcast_([t for net in nets for t in _tensors(net)])

    def replicas_differ(self) -> str | None:
        """Where the processes' networks are not the same, or None."""
        return parallel.differing({
            f"{name}.{key}": tensor
            for name, net in self.networks.items() for key, tensor in net.state_dict().items()
        })  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training, as tensors and plain values."""
        return {
            "networks": {name: net.state_dict() for name, net in self.networks.items()},
            "averaged": {name: net.state_dict() for name, net in self.averaged.items()},
            "optimizers": {name: _plain(opt) for name, opt in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "schedule": {
                "start": self.schedule_start,
                "cap": self.schedule_cap,
                "halvings": self.halvings,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._freeze_discriminators(False)  # a step that was left may have frozen them
        for name, net in self.networks.items():
            net.load_state_dict(state["networks"][name])
        for name, net in self.averaged.items():
            net.load_state_dict(state["averaged"][name])
        for name, optimizer in self.optimizers.items():
            ours = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizers"][name])
            for group, own in zip(optimizer.param_groups, ours, strict=True):
                group["capturable"] = own["capturable"]  # no matter of a checkpoint
                if isinstance(own["lr"], Tensor):
                    group["lr"] = own["lr"].fill_(group["lr"])
            for parameter, kept in optimizer.state.items():  # of a run with another layout
                for key in ("exp_avg", "exp_avg_sq"):
                    kept[key] = torch.empty_like(parameter).copy_(kept[key])
        schedule = state.get("schedule", {"start": 0, "cap": 1.0})  # older files have none
        self.schedule_start, self.schedule_cap = schedule["start"], schedule["cap"]
        self.halvings = schedule.get("halvings", 0)
        if state["scaler"]:  # of another precision, it starts anew
            self.scaler.load_state_dict(state["scaler"])


def memory_format(trainer: TrainerConfig, device: torch.device) -> torch.memory_format:
    """How weights and images lie: what `trainer.memory_format` says, or what is faster there.

    A GPU's convolutions of half types are made for channels_last; in float32 NCHW is the faster
    one. A CPU's oneDNN reorders NCHW at every call.
    """
    if trainer.memory_format == "auto":
        last = device.type == "cpu" or PRECISIONS[trainer.precision] is not torch.float32
    else:
        last = trainer.memory_format == "channels_last"
    return torch.channels_last if last else torch.contiguous_format


def averaged(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each figure over the parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def scheduled(kind: str, decay_from: float, step: int, steps: int) -> float:
    """The share of a learning rate at `step` of `steps`."""
    start = decay_from * steps
    if kind == "constant" or step < start:
        return 1.0
    left = max(0.0, (steps - step) / max(steps - start, 1))
    return left if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def _plain(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state, with rates that are numbers."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _pairs(one: nn.Module, other: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_tensors(one), _tensors(other), strict=True)


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
