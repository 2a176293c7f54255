"""What TensorBoard shows of a run beyond its scalars: charts of several lines, pictures, curves.

Everything is drawn by libraries (scikit-learn's confusion matrix, TensorBoard's own tabs) from what
the evaluation has seen already; only the pictures cost passes of a generator.
"""

import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from sklearn.metrics import ConfusionMatrixDisplay
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams

from gannorm.diagnostics.norm_layers import input_statistics, norm_layers
from gannorm.metrics.distances import PRD_SLOPES, precision_recall_curve
from gannorm.metrics.evaluation import Evaluation, ReferenceSet, evenly
from gannorm.metrics.figures import FIGURES, average
from gannorm.metrics.observations import Observations
from gannorm.tasks import Evaluator
from gannorm.training.monitor import Monitor

# By category and chart: the scalars (regular expressions) that stand in it together.
CHARTS = {
    "quality": {
        "fid of each class": r"class_fid/\d+",
        "accuracy of each class": r"class_accuracy/\d+",
    },
    "losses": {
        "generators": r"loss/G(_[AB])?",
        "discriminators": r"loss/D(_[AB])?",
        "penalties": r"loss/D\w*_penalty",
        "cycle": r"loss/cycle_[AB]",
        "identity": r"loss/identity_[AB]",
    },
    "discriminator balance": {
        "judged right": r"balance/\w+_right",
        "mean logits": r"loss/D\w*_(real|fake)",
        "gradient norms": r"balance/gradient_[GD]",
    },
    "speed": {
        "images per second": r"speed/images_per_second",
        "evaluation's share of the time": r"speed/evaluation_share",
        "learning rates": r"lr/\w+",
    },
    "health": {
        "warnings (1 while reported)": r"health/\w+",
        "diversity of samples (real images: 1)": r"probe/diversity\w*",
        "finest checkerboard (real images: 1)": r"probe/checkerboard\w*",
        "correlation of brightness": r"probe/polarity\w*",
        "running statistics against the batch's": r"probe/norm_gap",
    },
}
# One list for both families: TensorBoard takes the columns of the first run that it finds.
HPARAMS = (
    "model.name", "norm.name", "data.name", "data.batch_size", "loss.gan", "loss.r1", "loss.r2",
    "loss.gradient_penalty", "loss.diffaugment", "optim.lr_g", "optim.lr_d", "optim.beta1",
    "optim.beta2", "optim.d_steps", "optim.ema_decay", "trainer.steps", "trainer.precision", "seed",
)  # fmt: skip
FIRST = {"model.name", "norm.name", "data.name", "loss.gan", "seed"}  # the tab ticks five columns
PACKAGES = (
    "gannorm", "torch", "torchvision", "triton", "torchmetrics", "scikit-learn", "numpy",
    "hydra-core", "tensorboard",
)  # fmt: skip
LAYERS, CLASSES = 24, 10  # histograms: of so many norms, and classes of each, evenly spaced
NUMBERED = 20  # classes whose confusion matrix has room for numbers
LONGEST = 16  # letters of a name on its axes


class Dashboard:
    """What a run adds to its event file at each evaluation, and at its end.

    floor: scalars that do not change, as reference/FIGURE_real; logged anew each time, so that
        they are lines beside the others.
    """

    def __init__(
        self, monitor: Monitor, evaluator: Evaluator[Any], floor: dict[str, float]
    ) -> None:
        self.monitor, self.floor = monitor, floor
        self.evaluator, self.task = evaluator, evaluator.task
        self.arranged: dict[str, Any] = {}
        self.curves: dict[str, dict[str, Any]] = {}  # of held-out images

    @property
    def writer(self) -> Any:
        """The monitor's, which a rewind makes anew."""
        return self.monitor.writer

    @torch.no_grad()
    def show(self, step: int, evaluation: Evaluation) -> None:
        charts = layout(self.monitor.tags | self.floor.keys())
        if charts != self.arranged:
            self.writer.add_custom_scalars(charts)
            self.arranged = charts
        for way, (reference, generated) in evaluation.observed.items():
            name = way.removeprefix("_") or "samples"
            if generated.labels is not None and generated.predicted is not None:
                figure = confusion(generated, self.task.num_classes or 0, self.task.class_names)
                self.writer.add_figure(f"confusion/{name}", figure, step)
            if way not in self.curves:
                self.curves[way] = _curve(reference, reference.held_out)
            for tag, curve in (
                (name, _curve(reference, generated)),
                (f"{name}_real", self.curves[way]),
            ):
                self.writer.add_pr_curve_raw(
                    f"precision_recall/{tag}", **curve, global_step=step, num_thresholds=PRD_SLOPES
                )
        with input_statistics(self.task.averaged) as statistics:
            for name, (images, columns) in self.evaluator.pictures().items():
                self.monitor.grid(name, images, columns, step)
        networks = {**self.task.averaged, **self.task.discriminators}
        for name, values in (norm_tensors(networks) | statistics).items():
            if values.isfinite().all():
                self.writer.add_histogram(name, values, step)  # a group of the tab for each layer

    def compare(self, config: dict[str, Any], quality: dict[str, float]) -> None:
        """The run's line in the HParams tab, in its own event file: its settings, final/FIGURE
        (the mean over both directions of a translation)."""
        final = {
            f"final/{name}": average(name, quality)
            for name, figure in FIGURES.items()
            if figure.compared
        }
        for tag, value in final.items():
            if value is not None:
                self.writer.add_scalar(tag, value)
        experiment, *session = hparams(hyperparameters(config), final)
        data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in FIRST
        data.content = content.SerializeToString()
        for summary in (experiment, *session):
            self.writer._get_file_writer().add_summary(summary)


def _curve(reference: ReferenceSet, images: Observations) -> dict[str, Any]:
    """What a PR curve consists of; in the place of its four counts, the shares of 100 images:
    generated ones among real ones and beside them, none, real ones that were not generated."""
    precision, recall = precision_recall_curve(reference.real.features, images.features)
    shares = {
        "true_positive": precision,
        "false_positive": 1 - precision,
        "true_negative": torch.zeros_like(recall),
        "false_negative": 1 - recall,
    }
    counts = {f"{name}_counts": (100 * x).round().numpy() for name, x in shares.items()}
    return {**counts, "precision": precision.numpy(), "recall": recall.numpy()}


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Of the scalars `tags`, what the Custom Scalars tab shows: category, chart, its lines.

    A chart of quality has the averaged generator, the trained one and the floor; untranslated
    images too, but for distances, which they would dwarf. A chart's lines are the same in every run
    that has it: TensorBoard shows runs together where they are.
    """
    tags = list(tags)
    charts: dict[str, dict[str, list[str]]] = {category: {} for category in CHARTS}
    for key, figure in FIGURES.items():
        if figure.needs == "cycle":
            charts["quality"][key] = [rf"quality/{key}_[AB]"]
            continue
        for name in (key, f"{key}_AtoB", f"{key}_BtoA"):
            lines = [f"quality/{name}", f"quality_raw/{name}", f"reference/{name}_real"]
            if figure.higher:
                lines.append(f"reference/{name}_untranslated")
            charts["quality"][name] = lines
    for category, patterns in CHARTS.items():
        charts[category] |= {title: [pattern] for title, pattern in patterns.items()}
    shown = {
        category: {
            title: ["Multiline", [f"^{line}$" for line in lines]]
            for title, lines in by_title.items()
            if any(re.fullmatch(line, tag) for line in lines for tag in tags)
        }
        for category, by_title in charts.items()
    }
    return {category: by_title for category, by_title in shown.items() if by_title}


def confusion(images: Observations, classes: int, names: Sequence[str] | None = None) -> Figure:
    """A heat map: class asked for x class that the classifier of real images reads, in percent.

    names: of the classes, on both axes; their numbers by default.
    """
    assert images.labels is not None and images.predicted is not None
    asked, read = images.labels.cpu(), images.predicted.cpu()
    shown = [_short(name) for name in names or map(str, range(classes))]
    room = max(map(len, shown)) * 0.075  # inches; a number needs no more than there is
    room = room if room > 0.25 else 0.0
    figure = Figure(figsize=(5 + room, 4.2 + room))
    ConfusionMatrixDisplay.from_predictions(
        asked, read, normalize="true", labels=range(classes), display_labels=shown,
        xticks_rotation="vertical" if room else "horizontal", values_format=".0%",
        include_values=classes <= NUMBERED, cmap="Blues", ax=figure.subplots(),
        text_kw={"fontsize": "small"}, im_kw={"vmin": 0, "vmax": 1},
    )  # fmt: skip
    left, bottom = (0.6 + room) / (5 + room), (0.5 + room) / (4.2 + room)
    figure.subplots_adjust(left, bottom, 1.0, 1 - 0.34 / (4.2 + room))
    axes = figure.axes[0]
    if classes > NUMBERED:  # nor for every name
        places = evenly(classes, NUMBERED).tolist()
        axes.set(xticks=places, yticks=places)
        axes.set_xticklabels([shown[k] for k in places])
        axes.set_yticklabels([shown[k] for k in places])
    axes.set(xlabel="class read", ylabel="class asked for")
    axes.set_title(f"{float((asked == read).float().mean()):.1%} read correctly", fontsize="medium")
    return figure


def _short(name: str) -> str:
    """As much of a name as an axis has room for; a $ would begin a formula."""
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    return name.replace("$", r"\$")


def class_table(names: Sequence[str]) -> str:
    """Which class a number in a scalar's name (class_fid/3) means, as a table in markdown."""
    rows = [f"| {k} | {name.replace('|', chr(92) + '|')} |" for k, name in enumerate(names)]
    return "\n".join(["| number | class |", "| --- | --- |", *rows])


def norm_tensors(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Weights, biases and running statistics of norm layers as LAYER/TENSOR, of a table each
    class's row as LAYER/TENSOR/class_K."""
    layers = {
        f"{net}.{name}": layer
        for net, network in networks.items()
        for name, layer in norm_layers(network).items()
    }
    names = list(layers)
    tensors = {}
    for i in evenly(len(names), min(len(names), LAYERS)).tolist():
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(layers[names[i]], key, None)
            if tensor is None:
                continue
            full = f"{names[i]}/{key}"
            if tensor.dim() == 1:
                tensors[full] = tensor
            else:
                rows = evenly(len(tensor), min(len(tensor), CLASSES)).tolist()
                tensors |= {f"{full}/class_{k}": tensor[k] for k in rows}
    return tensors


def hyperparameters(config: dict[str, Any]) -> dict[str, str | float]:
    """HPARAMS of a composed config; a list in one word, what is not set as 0."""
    values: dict[str, str | float] = {}
    for key in HPARAMS:
        value = OmegaConf.select(OmegaConf.create(config), key)
        if isinstance(value, Iterable) and not isinstance(value, str):
            value = ",".join(map(str, value)) or "none"
        values[key] = 0.0 if value is None else value
    return values


def environment(device: str) -> str:
    """Where a run runs, as a table in markdown."""
    rows = {
        "command": f"`{' '.join(sys.argv)}`",
        "device": device,
        "machine": f"{platform.platform()}, {platform.machine()}",
        "python": platform.python_version(),
    }
    if torch.version.cuda or torch.version.hip:
        rows["CUDA / HIP"] = f"{torch.version.cuda or torch.version.hip}"
    for package in PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["git commit"] = _commit()
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def _commit() -> str:
    """Of the source tree; a package that was installed without it has none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package may lie inside another's repository
        return "unknown"
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
