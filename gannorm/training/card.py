"""The model card beside an exported file: what the network is, and how to load it."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gannorm.tasks import Task
from gannorm.training.report import shown, versions

MARK = "library_name: gannorm"
KINDS = {  # by model: a tag, and the hub's name of what it does
    "cyclegan": ("image-to-image", "image-to-image"),
    "resblock_gan": ("class-conditional", "unconditional-image-generation"),
}
LOADING = {
    "safetensors": """\
```python
from pathlib import Path
from gannorm.commands.trained import load_task

net = load_task(Path("{file}")).{attribute}
```
""",
    "onnx": """\
```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
inputs = {inputs}
(output,) = session.run(None, inputs)
```
""",
    "torch-export": """\
```python
import torch

net = torch.export.load("{file}").module()
inputs = {inputs}
output = net(*inputs.values())
```
""",
    "reference": """\
The reference PyTorch CycleGAN code builds this network with `{options}` and loads the file as it
loads its own, which are named `latest_net_{net}.pth`. Or here:

```python
from pathlib import Path
from gannorm.commands.trained import load_task

net = load_task(Path("{file}")).{attribute}
```
""",
}


def place(file: Path) -> Path:
    """Where the card of this file goes: a README.md is the folder's own."""
    readme = file.parent / "README.md"
    return file.with_suffix(".md") if readme.exists() else readme


def card(
    file: Path,
    form: str,
    task: Task,
    config: dict[str, Any],
    about: dict[str, Any],
    summary: dict[str, Any] | None,
    loading: dict[str, str],
) -> str:
    """Markdown with the hub's front matter.

    Args:
        config: as composed, to be shown.
        about: of the weights: networks, which weights, data (None: as configured), step and
            versions of the training; size, of what images are taken, where it is known.
        summary: summary.json of the run, if the checkpoint lies in one.
        loading: what `LOADING[form]` asks for.
    """
    cfg = task.cfg
    tag, pipeline = KINDS.get(cfg.model.name, (cfg.model.name, "image-to-image"))
    front = ["---", MARK, f"pipeline_tag: {pipeline}", "tags:", "- gan", f"- {tag}", "---"]
    pair = cfg.data.channel_pair
    data = f"`{cfg.data.name}`, {cfg.data.size[0]}x{cfg.data.size[1]} pixels"
    facts = {
        "networks": ", ".join(about["networks"]),
        "generators": about["weights"] if set(about["networks"]) & set(task.averaged) else None,
        "norm": f"`{cfg.norm.name}`",
        "trained on": about["data"] or data,
        "channels": str(pair[0]) if pair[0] == pair[1] else f"A {pair[0]}, B {pair[1]}",
        "values": "images in [-1, 1], (N, C, H, W)",
        "input size": about.get("size"),
        "classes": task.num_classes if cfg.model.name == "resblock_gan" else None,
        "training step": about.get("step"),
        "trained with": _listed(about.get("versions")),
        "exported with": _listed(versions()),
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    return "\n".join(
        [
            *front, "", f"# {file.name}", "", f"Of a {cfg.model.name}, exported by gannorm.", "",
            "| | |", "|---|---|", *rows, "",
            *_figures(summary),
            "## Loading", "", LOADING[form].format(file=file.name, **loading),
            "## Configuration", "", "```yaml", OmegaConf.to_yaml(config).rstrip(), "```", "",
        ]
    )  # fmt: skip


def _listed(items: dict[str, str] | None) -> str | None:
    return ", ".join(f"{k} {v}" for k, v in items.items()) if items else None


def _figures(summary: dict[str, Any] | None) -> list[str]:
    """The run's figures, or nothing."""
    if not summary or not summary.get("quality"):
        return []
    rows = [
        f"| {name} | {shown(name, value)} |"
        for name, value in summary["quality"].items()
        if "/" not in name
    ]
    best = summary.get("best") or {}
    lines = ["## Figures", "", f"At the end of the run, step {summary['steps']}.", ""]
    lines += ["| figure | averaged generators |", "|---|---|", *rows, ""]
    if best.get("value") is not None:
        value = shown(best["figure"], best["value"])
        lines += [f"Best {best['figure']}: {value}, at step {best['step']} (`best.pt`).", ""]
    return lines
