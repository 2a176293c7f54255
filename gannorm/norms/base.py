"""What the norm layers share: the epilogue, the values they start with, running statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gannorm.norms.checks import (
    ACTIVATIONS,
    DEGENERATE,
    VAR_ESTIMATORS,
    check_choice,
    check_weight_init,
)
from gannorm.norms.composed import NormSpec, finish

SETTINGS = ("weight_init", "var_estimator", "degenerate")  # in the repr where not the default


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


class NormLayer(nn.Module):
    """The part of every layer that is ours.

    The class's own values stand for a layer that says nothing else, so that one of torch's norms
    becomes ours by its class alone (`gannorm.convert`).
    """

    epilogue = Epilogue()
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

    def fuse(self, activation: str, negative_slope: float) -> None:
        """Apply `activation` behind the norm from now on."""
        after = self.epilogue.residual_after_activation
        self.epilogue = Epilogue(activation, negative_slope, after)

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


class BatchLayer(NormLayer):
    """Running statistics of a batch norm."""

    var_estimator = "unbiased"
    degenerate = "raise"
    momentum: float | None
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def _extend_batch(self, var_estimator: str, degenerate: str) -> None:
        check_choice("var_estimator", var_estimator, VAR_ESTIMATORS)
        check_choice("degenerate", degenerate, DEGENERATE)
        self.var_estimator, self.degenerate = var_estimator, degenerate

    def _on_running_stats(
        self,
        input: Tensor,
        run: Callable[[Tensor | None, Tensor | None, bool, float], Tensor],
    ) -> Tensor:
        """run(running_mean, running_var, training, momentum); a batch it refuses is not counted.

        An empty batch moves no statistics and is not counted either.
        """
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training:
            return run(mean, var, mean is None and var is None, 0.0)
        if not self.track_running_stats:  # can be switched off later, as torch's can
            return run(None, None, True, 0.0)
        if self.momentum is not None or mean is None or var is None or count is None:
            y = run(mean, var, True, self.momentum or 0.0)
        else:  # the plain average; 1 / count read as a number would wait for a GPU
            batch = (mean.clone(), var.clone())
            y = run(*batch, True, 1.0)
            share = 1.0 / (count + 1)
            for running, new in zip((mean, var), batch, strict=True):
                running.lerp_(new, share.to(running.dtype))
        if count is not None and input.numel():
            count.add_(1)
        return y


class NoNorm(nn.Module):
    """No normalization, only the epilogue: what `norm=none` puts in a norm's place."""

    def __init__(
        self, activation: str | None, negative_slope: float, residual_after_activation: bool
    ) -> None:
        super().__init__()
        self.epilogue = Epilogue(activation, negative_slope, residual_after_activation)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        e = self.epilogue
        spec = NormSpec(0, 0.0, e.activation, e.negative_slope, e.residual_after_activation)
        return finish(input, residual, spec, False)

    def extra_repr(self) -> str:
        return str(self.epilogue).removeprefix(", ")
