"""The norm study: what `study=` can choose, one norm in one task at one batch size each.

    python train.py -m seed=0,1,2 'study=glob(*)'

The choices are made from a table and registered with Hydra, because as files they would be 19 that
differ in a word. A choice sets the norm, the batch size, the loss, how long it trains and its run
folder; everything else is the model's own configuration. Runs of a task and batch size take the
same number of steps, so that all norms see the same images, and those numbers are such that every
run takes about the same time.

`python -m gannorm.study` makes the report.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from gannorm.models.norm_factory import NORMS

FOLDER = "norm_study"  # below hydra.sweep.dir


# Steps by model and batch size: 75 to 90 s on one core of a Xeon, evaluation included. To be
# measured again where a model's configuration, and so the time of its steps, changes.
STEPS = {("cyclegan", 1): 960, ("cyclegan", 16): 216, ("resblock_gan", 16): 560}
# Without penalties a step costs half: in this time the penalized loss would not get anywhere.
LOSS = {"cyclegan": "lsgan", "resblock_gan": "hinge"}
EVALUATIONS = {"cyclegan": 6, "resblock_gan": 10}
MISTAKES: dict[str, dict[str, Any]] = {
    "gamma_0": {"weight_init": [0.0, 0.0]},
    "moving_var_0": {"running_var_init": 0.0},
}


@dataclass(frozen=True)
class Member:
    """One choice of `study=`.

    Attributes:
        model, norm: choices of these groups.
        mistake: "", or the name of what `norm_keys` do wrong.
        norm_keys: keys of the norm's configuration that differ.
    """

    model: str
    norm: str
    batch_size: int
    mistake: str = ""
    norm_keys: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = (self.model, self.norm, str(self.batch_size), self.mistake)
        return "-".join(part for part in parts if part)

    def config(self) -> dict[str, Any]:
        """What the choice's file would hold, with the package _global_."""
        folder = f"{FOLDER}/{self.name}/seed_${{seed}}"
        steps = STEPS[self.model, self.batch_size]
        return {
            "defaults": [
                {"override /model": self.model},
                {"override /norm": self.norm},
                {"override /loss": LOSS[self.model]},
                "_self_",
            ],
            "norm": self.norm_keys,
            "data": {"batch_size": self.batch_size},
            "trainer": {"steps": steps, "eval_every": steps // EVALUATIONS[self.model]},
            "hydra": {"run": {"dir": f"outputs/{folder}"}, "sweep": {"subdir": folder}},
        }


def members() -> dict[str, Member]:
    """Every member by name: each norm that a task takes, then the tutorials' two mistakes."""
    plain = [name for name, norm in NORMS.items() if norm.unconditional is None]
    pairs = [
        *(("cyclegan", norm, size) for size in (1, 16) for norm in plain),
        *(("resblock_gan", norm, 16) for norm in NORMS),
    ]
    found = [Member(model, norm, size) for model, norm, size in pairs]
    for mistake, keys in MISTAKES.items():
        found.append(Member("resblock_gan", "conditional_batch", 16, mistake, keys))
    return {member.name: member for member in found}


def register() -> None:
    """Tell Hydra the choices; call it before a config is composed."""
    for name, member in members().items():
        ConfigStore.instance().store(name, member.config(), group="study", package="_global_")
