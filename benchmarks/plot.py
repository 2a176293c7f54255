"""The roofline: bytes that must move against the GB/s reached, below the copy bandwidth."""

from pathlib import Path
from typing import Any

CONTESTANTS = {"ours": "o", "eager": "x", "compile": "^"}


def main_protocol(times: dict[str, float]) -> str:
    """The protocol that tables and plots show: device time from memory, where there is a GPU."""
    return "graph_cold" if "graph_cold" in times else "wall"


def shared_protocol(times: list[dict[str, float]]) -> str:
    """`main_protocol` of times that are compared with each other: one that all of them have."""
    return main_protocol(times[0] if all("graph_cold" in t for t in times) else {})


def draw(result: dict[str, Any], path: Path) -> str:
    """Write the PNG; what to say about it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grown = result["growth"].get("pixels")
    figure, axes = pyplot.subplots(1, 3 if grown else 2, figsize=(16 if grown else 11, 4.5))
    for axis, direction in zip(axes, ("forward", "both"), strict=False):
        _roofline(axis, result, direction)
    if grown:
        _growth(axes[2], result["growth"])
    figure.suptitle(f"{result['device']}, {result['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return str(path)


def _roofline(axis: Any, result: dict[str, Any], direction: str) -> None:
    for who, marker in CONTESTANTS.items():
        points = [
            (e["floor_bytes"], e["floor_bytes"] / times[main_protocol(times)] / 1000)
            for e in result["cases"]
            if e["direction"] == direction and (times := e["times_us"].get(who))
        ]
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, s=22, alpha=0.7, label=who)
    axis.axhline(result["copy_gbps"], color="black", linewidth=1, label="copy")
    axis.set(
        xscale="log", yscale="log", xlabel="bytes that must move", ylabel="GB/s of those bytes",
        title="forward" if direction == "forward" else "forward + backward",
    )  # fmt: skip
    axis.legend()


def _growth(axis: Any, growth: dict[str, Any]) -> None:
    for who, times in growth["times_us"].items():
        axis.plot(growth["pixels"], times, marker=CONTESTANTS[who], label=who)
    axis.set(
        xscale="log", yscale="log", xlabel="pixels of a plane", ylabel="microseconds",
        title=f"{growth['layer'].split('-')[0]} norm, forward + backward",
    )  # fmt: skip
    axis.legend()
