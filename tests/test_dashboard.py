"""A run's folder as TensorBoard itself serves it: charts, pictures, curves, histograms, HParams."""

import io
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from tensorboard import default, program

from gannorm.metrics import features
from gannorm.metrics.evaluation import Evaluation
from gannorm.metrics.figures import FIGURES
from gannorm.metrics.observations import Observations
from gannorm.tasks.class_conditional_evaluator import ClassConditionalEvaluator
from gannorm.training.dashboard import (
    FIRST,
    HPARAMS,
    Dashboard,
    class_table,
    confusion,
    environment,
    layout,
)
from gannorm.training.loop import train
from gannorm.training.monitor import Monitor

CONF = Path(__file__).parents[1] / "conf"
FINAL = [name for name, figure in FIGURES.items() if figure.compared]
SMALL = [
    "trainer.steps=4", "trainer.log_every=1", "trainer.eval_every=2", "trainer.sample_every=4",
    "metrics.samples=40",
]  # fmt: skip
RUNS = {
    "translation": ["model.width=4", "model.blocks=1", "model.d_width=4", "data.batch_size=2"],
    "classes": [
        "model=resblock_gan", "model.g_widths=[8,8,8,8]", "model.d_widths=[8,8]",
        "model.d_downsamplings=2", "model.z_dim=4", "data.batch_size=4",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Asks a TensorBoard server of one run of each family."""
    folder = tmp_path_factory.mktemp("runs")
    with (
        pytest.MonkeyPatch.context() as patch,
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        patch.setattr(features, "STEPS", 2)
        for name, changes in RUNS.items():
            train(compose("config", [*SMALL, *changes]), folder / name)
    server = program.TensorBoard(default.get_plugins())
    server.configure(argv=["", "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    url = server.launch()

    def ask(path: str, body: dict | None = None, **query):
        address = f"{url}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read()
            return json.loads(content) if "json" in answer.headers["Content-Type"] else content

    ask.folder = folder
    for _ in range(300):  # it reads the files in a thread of its own, their ends last
        if len(finished(ask)) == len(RUNS):
            return ask
        time.sleep(0.1)
    raise TimeoutError("TensorBoard did not read the runs")


def finished(board) -> list[dict]:
    """The HParams tab's lines of runs that came to their end."""
    columns = [{"metric": {"tag": f"final/{name}"}} for name in FINAL]
    statuses = ["STATUS_SUCCESS"]
    request = {"colParams": columns, "startIndex": 0, "sliceSize": 10, "allowedStatuses": statuses}
    return board("hparams/session_groups", request).get("sessionGroups", [])


def test_every_chart_has_its_lines(board):
    categories = {c["title"]: c["chart"] for c in board("custom_scalars/layout")["category"]}
    assert list(categories) == ["quality", "losses", "discriminator balance", "speed", "health"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in categories["quality"]}
    assert charts["fid"] == ["^quality/fid$", "^quality_raw/fid$", "^reference/fid_real$"]
    assert "^reference/psnr_AtoB_untranslated$" in charts["psnr_AtoB"]
    assert charts["accuracy of each class"] == [r"^class_accuracy/\d+$"]
    # Runs of both families stand together: no title twice.
    titles = [chart["title"] for charts in categories.values() for chart in charts]
    assert len(titles) == len(set(titles))
    for run, title in (("classes", "fid"), ("translation", "fid_AtoB")):
        for tag in charts[title]:
            found = board("custom_scalars/scalars", tag=tag, run=run)
            ((name, points),) = found["tag_to_events"].items()
            assert re.fullmatch(tag, name)
            # A floor is a line too: it has a point at each evaluation.
            assert {2, 4} <= {step for _, step, _ in points}
    shown = {tag for charts in categories.values() for c in charts for tag in c["multiline"]["tag"]}
    logged = {
        key
        for run in RUNS
        for line in (board.folder / run / "metrics.jsonl").open()
        for key in json.loads(line)
    }
    missing = {
        tag for tag in logged if "/" in tag and not any(re.fullmatch(line, tag) for line in shown)
    }
    assert all(tag.startswith("reference/") for tag in missing), missing


def test_pictures(board):
    """Of each kind at each evaluation, in rows and columns."""
    tags = board("images/tags")
    assert set(tags["classes"]) == {
        "samples/class_by_noise", "confusion/samples",
        "interpolation/noise_to_noise_in_each_class", "interpolation/each_class_to_the_next",
        "neighbours/samples_above_nearest_training_images",
    }  # fmt: skip
    assert set(tags["translation"]) == {
        "samples/A_to_B_to_A", "samples/B_to_A_to_B", "confusion/AtoB", "confusion/BtoA",
        "neighbours/A_to_B_above_nearest_training_images",
        "neighbours/B_to_A_above_nearest_training_images",
    }  # fmt: skip
    sizes = {"interpolation": (10, 10), "neighbours": (10, 4)}
    for tag in tags["classes"]:
        found = board("images/images", run="classes", tag=tag, sample=0)
        if not tag.startswith("samples/"):
            assert [entry["step"] for entry in found] == [2, 4]
        content = board("images/individualImage?" + found[-1]["query"])
        picture = np.array(Image.open(io.BytesIO(content)))
        assert picture.std() > 1
        if tag.split("/")[0] in sizes:
            columns, rows = sizes[tag.split("/")[0]]
            assert picture.shape == (4 + 100 * rows, 4 + 100 * columns, 3)


def test_precision_recall_curves(board):
    for run, names in (("classes", ["samples"]), ("translation", ["AtoB", "BtoA"])):
        tags = {f"precision_recall/{name}{end}" for name in names for end in ("", "_real")}
        assert set(board("pr_curves/tags")[run]) == tags
    (curves,) = board("pr_curves/pr_curves", run="classes", tag="precision_recall/samples_real")[
        "classes"
    ][-1:]
    assert curves["step"] == 4 and len(curves["precision"]) > 50
    best = min(max(p, r) for p, r in zip(curves["precision"], curves["recall"], strict=True))
    assert best > 0.7  # real images are as good as real images, but for their number


def test_histograms(board):
    """A table's rows by class, and where a norm keeps no statistics, its inputs'."""
    tags = board("histograms/tags")
    conditional = {
        f"G.blocks.0.norm1/{name}/class_{k}" for name in ("weight", "bias") for k in range(10)
    }
    running = {f"G.blocks.0.norm1/running_{name}" for name in ("mean", "var")}
    assert conditional | running <= set(tags["classes"]) and len(tags["classes"]) < 200
    assert {tag.rpartition("/")[2] for tag in tags["translation"]} == {"input_mean", "input_std"}
    (_, second) = board("histograms/histograms", run="classes", tag=sorted(running)[0])
    step, buckets = second[1:]
    assert step == 4 and sum(count for _, _, count in buckets) == 8  # channels


def test_runs_are_compared_in_one_table(board):
    """One line each in the folder of the run itself, with columns that both families fill."""
    experiment = board("hparams/experiment", {"experimentName": ""})
    metrics = [info["name"] for info in experiment["metricInfos"]]
    first = {info["name"] for info in experiment["hparamInfos"][:5]}
    assert first == FIRST and {name["tag"] for name in metrics} == {f"final/{x}" for x in FINAL}
    assert {info["name"] for info in experiment["hparamInfos"]} == set(HPARAMS)
    groups = finished(board)
    assert {group["hparams"]["norm.name"] for group in groups} == {"instance", "conditional_batch"}
    for group in groups:
        (session,) = group["sessions"]
        folder = board.folder / session["name"]
        quality = json.loads((folder / "summary.json").read_text())["quality"]
        own = [v for k, v in quality.items() if k in ("fid", "fid_AtoB", "fid_BtoA")]
        (found,) = (v["value"] for v in group["metricValues"] if v["name"]["tag"] == "final/fid")
        assert found == pytest.approx(sum(own) / len(own), rel=1e-5)
        assert not [path for path in folder.iterdir() if "tfevents" in path.name][1:]


def test_environment_and_config_are_texts(board):
    tags = board("text/tags")["classes"]
    assert {"config/text_summary", "environment/text_summary"} <= set(tags)
    (text,) = board("text/text", run="classes", tag="environment/text_summary")
    assert torch.__version__.split("+")[0] in text["text"] and "CPU, 1 threads" in text["text"]
    assert "git commit" in environment("CPU")


def test_a_chart_has_what_was_logged_alone():
    found = layout(
        {
            "quality/cycle_psnr_A",
            "quality/unheard_of",
            "loss/G",
            "loss/GG",
            "loss/D_real",
            "loss/D_fake",
        }
    )
    assert {category: list(charts) for category, charts in found.items()} == {
        "quality": ["cycle_psnr"],
        "losses": ["generators"],
        "discriminator balance": ["mean logits"],
    }
    assert found["losses"]["generators"] == ["Multiline", ["^loss/G(_[AB])?$"]]


def test_confusion_counts_by_the_class_asked_for():
    asked, read = torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 0, 0, 1, 2])
    seen = Observations(
        torch.zeros(5, 1), torch.zeros(5, 1008), read, asked
    )  # logits of another network
    figure = confusion(seen, 3)
    axes = figure.axes[0]
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == ["75%", "25%", "0%", "0%", "0%", "0%", "0%", "0%", "100%"]
    assert axes.get_title() == "80.0% read correctly" and axes.get_ylabel() == "class asked for"
    # Without room for numbers there are none.
    many = confusion(seen, 100)
    assert not many.axes[0].texts


def test_classes_have_their_names_on_the_axes(tmp_path):
    asked = torch.arange(3)
    seen = Observations(torch.zeros(3, 1), torch.zeros(3, 3), asked, asked)
    names = ["cat", r"$\no$ formula", "a name that is too long for an axis"]
    figure = confusion(seen, 3, names)
    figure.savefig(tmp_path / "drawn.png")  # where a formula would fail
    axes = figure.axes[0]
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [text.get_text() for text in axis] == [
            "cat", r"\$\no\$ formula", "a name that is …",
        ]  # fmt: skip
    plain = confusion(seen, 3).axes[0]
    assert [text.get_text() for text in plain.get_yticklabels()] == ["0", "1", "2"]
    # Where there is no room for every name, every fifth stands at its own place.
    many = confusion(seen, 100, [f"c{k}" for k in range(100)]).axes[0]
    found = {int(t.get_position()[0]): t.get_text() for t in many.get_xticklabels()}
    assert found == {k: f"c{k}" for k in range(0, 100, 5)}
    assert class_table(["a", "b|c"]).splitlines()[2:] == ["| 0 | a |", r"| 1 | b\|c |"]


def test_names_stand_beside_the_rows_that_are_classes():
    class Named:
        class_names, num_classes = [f"class {k}" for k in range(12)], 12

    evaluator = object.__new__(ClassConditionalEvaluator)
    evaluator.task = Named()
    ten = Named.class_names[:10]
    for picture in ("samples/class_by_noise", "interpolation/each_class_to_the_next"):
        assert evaluator.captions(picture) == (ten, ())
    name = "neighbours/samples_above_nearest_training_images"
    assert evaluator.captions(name) == ((), ten)
    evaluator.task.class_names = [str(k) for k in range(12)]  # which the order says itself
    assert evaluator.captions("samples/class_by_noise") == ([], ())


def test_a_run_without_references_shows_what_it_can(tmp_path):
    class Bare:
        averaged = discriminators = {}

        @property
        def task(self):
            return self

        def pictures(self):
            return {}

    monitor = Monitor(tmp_path, 0)
    monitor.scalars(1, {"loss/G": 1.0})
    Dashboard(monitor, Bare(), {}).show(1, Evaluation({}))
    monitor.close()
