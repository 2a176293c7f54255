"""What the norm layers share: the epilogue, the values they start with, running statistics."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gannorm.norms import sync
from gannorm.norms.checks import (
    ACTIVATIONS,
    DEGENERATE,
    VAR_ESTIMATORS,
    check_choice,
    check_weight_init,
)
from gannorm.norms.composed import NormSpec, finish, is_recomputed

# Where torch makes a batch norm anew: SyncBatchNorm, folding, oneDNN's layer.
REBUILDERS = ("torch.nn.modules.batchnorm", "torch.nn.utils.fusion", "torch.utils.mkldnn")
SETTINGS = (
    "weight_init",
    "var_estimator",
    "degenerate",
    "process_group",
)  # in the repr where not the default


@dataclass(frozen=True)
class Epilogue:
    """What happens behind the affine, fixed per layer."""

    activation: str | None = None
    negative_slope: float = 0.2
    residual_after_activation: bool = False

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ACTIVATIONS)

    def kwargs(self, residual: Tensor | None) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "residual": residual,
            "residual_after_activation": self.residual_after_activation,
        }

    def __str__(self) -> str:
        slope = f"({self.negative_slope})" if self.activation == "leaky_relu" else ""
        text = f", activation={self.activation}{slope}" if self.activation else ""
        return text + (", residual_after_activation=True" if self.residual_after_activation else "")


def symbol(layer: nn.Module, input: Any, *others: Any) -> Any:
    """A call of `layer` in a graph of torch.fx, where it stands as a whole, as torch's do.

    A tracer knows only what lies under `torch.nn` for such a leaf, and walks into others.
    """
    while others and others[-1] is None:
        others = others[:-1]
    path = input.tracer.path_of_module(layer)
    return input.tracer.create_proxy("call_module", path, (input, *others), {})


class NormLayer(nn.Module):
    """The part of every layer that is ours.

    The class's own values stand for a layer that says nothing else, so that one of torch's norms
    becomes ours by its class alone (`gannorm.convert`). `forward` takes another epilogue for one
    call: how a converted Sequential runs a norm and its activation as one.
    """

    epilogue = Epilogue()
    eps: float
    weight_init: tuple[float, float] | None = None  # None: 1, without drawing random numbers
    weight: Any  # nn.Parameter | None
    bias: Any

    def _extend(
        self, epilogue: Epilogue, weight_init: tuple[float, float] | None, bias: bool = True
    ) -> None:
        """Add to a layer that torch's constructor has made what torch's does not know."""
        self.epilogue = epilogue
        if not bias:  # an argument of torch's constructors only from 2.12 on
            self.register_parameter("bias", None)
        if weight_init is not None:
            check_weight_init(weight_init, self.weight is not None)
            self.weight_init = weight_init
            self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batch counted."""
        for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            buffer = getattr(self, name, None)
            if buffer is not None:
                buffer.fill_(start)

    def reset_parameters(self) -> None:
        """The values a layer starts with: weight 1 or N(*weight_init), bias 0, and the above."""
        self.reset_running_stats()
        if self.weight is not None:
            if self.weight_init is None:
                nn.init.ones_(self.weight)
            else:
                nn.init.normal_(self.weight, *self.weight_init)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile {self}: it knows neither ctypes nor Triton. Use "
            "torch.jit.trace, torch.export or torch.compile, which all take it, or torch's own norm"
        )

    def _settings(self) -> str:
        """The epilogue and what else of ours is not the default, for `extra_repr`."""
        pairs = [(name, getattr(self, name, None)) for name in SETTINGS]
        other = [f", {k}={v}" for k, v in pairs if v != getattr(type(self), k, None)]
        return "".join(other) + str(self.epilogue)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.weight is not None and self.bias is None and "bias=" not in text:
            text += ", bias=False"  # before torch 2.12
        return text + self._settings()


class UntrackedLayer(NormLayer):
    """A norm of a sample, which has no running statistics unless told."""

    track_running_stats = False

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *others: Any
    ) -> None:
        """As torch's; but what torch below 0.4 wrote into every file is dropped where there is no
        place for it, as the reference CycleGAN does."""
        if not self.track_running_stats and (local_metadata.get("version") or 0) < 2:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


class BatchLayer(NormLayer):
    """Running statistics of a batch norm, and with whom it shares those of a batch."""

    var_estimator = "unbiased"
    degenerate = "raise"
    process_group: str | None = None  # as in `batch_norm`, by name; see `gannorm.convert_sync`
    _eps: float  # for ourselves: torch 2.11's compiler cannot look past the property
    momentum: float | None
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    @property
    def eps(self) -> float:
        """Refused to the code of torch's that makes a batch norm anew from its parts, where that
        would lose something: it leaves no other place to say so.

        Raises:
            RuntimeError: torch's batch norm of the same parts would not do the same.
        """
        if sys._getframe(1).f_globals.get("__name__") in REBUILDERS:
            self._refuse_if_it_loses()
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = self._eps = value  # the first for torch's extra_repr

    def _refuse_if_it_loses(self) -> None:
        lost = [
            (self.weight is not None and self.weight.dim() == 2, "the table of its classes"),
            (self.epilogue.activation is not None, f"the activation {self.epilogue.activation!r}"),
            (self.training and self.var_estimator != "unbiased", "the biased running variance"),
        ]
        for has, what in lost:
            if has:
                raise RuntimeError(
                    f"{self}: torch would make it anew as a batch norm of its own, and lose "
                    f"{what}. Keep this norm, or take one without it (an activation can stand "
                    "behind the norm as a module of its own); gannorm.convert_sync makes it one of "
                    "several processes as it is"
                )

    def _extend_batch(self, var_estimator: str, degenerate: str) -> None:
        check_choice("var_estimator", var_estimator, VAR_ESTIMATORS)
        check_choice("degenerate", degenerate, DEGENERATE)
        self.var_estimator, self.degenerate = var_estimator, degenerate

    def _with(self) -> str | None:
        """`process_group` for a call: evaluation communicates with nobody."""
        return self.process_group if self.training else None

    def _shared(self) -> bool:
        return self.process_group is not None and sync.resolved(self.process_group) is not None

    def _on_running_stats(
        self,
        input: Tensor,
        run: Callable[[Tensor | None, Tensor | None, bool, float], Tensor],
    ) -> Tensor:
        """run(running_mean, running_var, training, momentum); a batch it refuses is not counted.

        An empty batch moves no statistics and is not counted either, unless others have the rest.
        """
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training:
            return run(mean, var, mean is None and var is None, 0.0)
        # Can be switched off later, as torch's can; and activation checkpointing runs this again.
        if not self.track_running_stats or is_recomputed():
            return run(None, None, True, 0.0)
        if self.momentum is not None or mean is None or var is None or count is None:
            y = run(mean, var, True, self.momentum or 0.0)
        else:  # the plain average; 1 / count read as a number would wait for a GPU
            batch = (mean.clone(), var.clone())
            y = run(*batch, True, 1.0)
            share = 1.0 / (count + 1)
            for running, new in zip((mean, var), batch, strict=True):
                running.lerp_(new, share.to(running.dtype))
        if count is not None and (input.numel() or self._shared()):
            count.add_(1)
        return y


class NoNorm(nn.Module):
    """No normalization, only the epilogue: what `norm=none` puts in a norm's place."""

    def __init__(
        self, activation: str | None, negative_slope: float, residual_after_activation: bool
    ) -> None:
        super().__init__()
        self.epilogue = Epilogue(activation, negative_slope, residual_after_activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        e = self.epilogue
        spec = NormSpec(0, 0.0, e.activation, e.negative_slope, e.residual_after_activation)
        return finish(input, residual, spec, False)

    def extra_repr(self) -> str:
        return str(self.epilogue).removeprefix(", ")
