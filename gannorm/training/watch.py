"""Warnings: a fault that has held for a while is printed and marked in TensorBoard."""

from collections.abc import Mapping

from gannorm.training.monitor import Monitor
from gannorm.training.report import say

PATIENCE = 100  # steps that a fault must hold before it is reported


class Watch:
    """Reports a fault once it has held for PATIENCE steps, and again if it comes back."""

    def __init__(self) -> None:
        self.since: dict[str, int] = {}  # the step at which a fault was first seen
        self.reported: dict[str, int] = {}

    def report(self, step: int, faults: Mapping[str, str], monitor: Monitor) -> dict[str, float]:
        """`health/<name>` for each of the faults: 1 while it is reported, else 0.

        A new one is printed, and is a text in TensorBoard.
        """
        health = {}
        for name, text in faults.items():
            if not text:
                self.since.pop(name, None)
                self.reported.pop(name, None)
            elif step - self.since.setdefault(name, step) >= PATIENCE:
                if name not in self.reported:
                    self.reported[name] = step
                    say(f"warning: step {step}: {text}")
                    monitor.text(f"health/{name}", text, step)
            health[f"health/{name}"] = float(name in self.reported)
        return health

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"since": dict(self.since), "reported": dict(self.reported)}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        self.since, self.reported = dict(state["since"]), dict(state["reported"])
