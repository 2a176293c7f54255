"""How a run computes its steps: each option alone and in pairs trains, or is refused by name."""

import re
from itertools import combinations

import pytest
import torch
from test_loop import config
from test_tasks import SIZES, build, data

from gannorm.errors import RequestError
from gannorm.training import options
from gannorm.training.determinism import deterministic
from gannorm.training.loop import train
from gannorm.training.nonfinite import where_it_began
from gannorm.training.options import check_options, prepare, stepping
from gannorm.training.run import Run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPTIONS = {
    "layout": "trainer.memory_format=contiguous",
    "tf32": "trainer.precision=tf32",
    "compile": "trainer.compile=true",
    "graph": "trainer.cuda_graph=true",
    "parts": "trainer.grad_accum=2",
    "checkpointing": "trainer.checkpointing=true",
    "deterministic": "trainer.deterministic=true",
    "penalty": "loss.r1=1",
    "fp16": "trainer.precision=fp16",
}
REFUSED = {
    ("compile", "checkpointing"): r"compile=true: .*checkpointing=true.*set one of them to false",
    ("compile", "penalty"): r"compile=true: loss.r1.*once; set them to 0",
    ("graph", "fp16"): r"cuda_graph=true: .*fp16.*set trainer.precision=bf16",
    ("tf32", "fp16"): None,  # one key
}
ALONE = [(name,) for name in OPTIONS]
PAIRS = [pair for pair in combinations(OPTIONS, 2) if REFUSED.get(pair, "") is not None]


@pytest.fixture
def an_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, marks=[pytest.mark.slow] * ("compile" in names and len(names) == 2))
        for names in ALONE + PAIRS
    ],
    ids="+".join,
)
def test_it_trains_or_is_refused(names, model, an_h100):
    """As on a GPU, but for its kernels; the compiler makes no code, which takes its time."""
    words = ["loss=hinge", "trainer.steps=20", *(OPTIONS[name] for name in names)]
    words += ["model.pool_size=4"] if model == "cyclegan" else []
    task = build(model, *words)
    if reason := REFUSED.get(names):
        with pytest.raises(RequestError) as told:
            check_options(task.cfg, CUDA)
        assert re.search(reason, str(told.value)) and "\n" not in str(told.value)
        return
    check_options(task.cfg, CUDA)
    prepare(task, "aot_eager")
    take = stepping(task)
    if "fp16" in names:
        task.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # it need not look for its scale
    trained = [p for nets in task.trained.values() for each in nets for p in each]
    before = [p.clone() for p in trained]
    with deterministic(task.cfg.trainer.deterministic, CPU), task.norm_backend():
        for number in range(5 if "graph" in names else 2):
            task.set_learning_rates(number)
            losses = take(data(task))
            task.update_averages(number)
    assert all(v.isfinite() for v in losses.values())
    moved = sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert moved > 0.8 * len(before)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["trainer.precision=tf32"], "precision=tf32: .*8.0 or later, and this is a CPU; set"),
        (["trainer.cuda_graph=true"], "cuda_graph=true: .*needs a GPU, and this is a CPU; set"),
        (["trainer.compile=true"], "compile=true: loss.r1, .*set them to 0"),  # rpgan has R1
    ],
)
def test_nothing_is_written(words, reason, tmp_path):
    with pytest.raises(RequestError, match=reason):
        train(config("resblock_gan", "trainer.device=cpu", *words), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_graph_cannot_have(an_h100, monkeypatch):
    def refusal(*words):
        with pytest.raises(RequestError) as told:
            check_options(build("cyclegan", "trainer.cuda_graph=true", *words).cfg, CUDA)
        return str(told.value)

    folders = ["data=folder_pair", "data.root=x", "data.preprocess=none"]
    assert "data.preprocess=none gives images of many sizes" in refusal(*folders)
    words = ["trainer.checkpointing=true", "model.dropout=true"]
    assert refusal(*words).endswith("set model.dropout=false, or trainer.cuda_graph=false")
    monkeypatch.setattr(options.parallel, "world", lambda: 2)
    assert "several processes" in refusal()


def test_an_older_gpu_has_no_tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    cfg = build("cyclegan", "trainer.precision=tf32").cfg
    with pytest.raises(RequestError, match="this is Tesla V100; set trainer.precision=fp32"):
        check_options(cfg, CUDA)


def test_a_compiler_that_does_not_work_is_named():
    task = build("cyclegan", "trainer.compile=true")

    def broken(graph, inputs):
        raise OSError("no g++ here\nat all")

    with pytest.raises(RequestError, match=r"needs a working C\+\+ compiler.*no g\+\+ here.*; ins"):
        prepare(task, broken)
    assert all(net._compiled_call_impl is None for net in task.networks.values())


def test_evaluation_is_eager():
    """And so is the search for a NaN, which looks at each layer."""
    task, graphs = build("cyclegan", "trainer.compile=true"), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    prepare(task, count)
    graphs.clear()  # of the attempt
    net, x = task.generators["G_A"], torch.randn(1, 3, 8, 8)
    with Run(task, {}).evaluating():
        net(x)
    assert not graphs
    net(x)
    assert graphs
    for p in net.parameters():
        p.data.fill_(float("nan"))
    assert "G_A model.1 (Conv2d)" in where_it_began(task, data(task))


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_compiled_networks_train_alike(model, backend):
    """20 steps of code that is really compiled, beside eager ones."""
    found = []
    for asked in ("false", "true"):
        words = ["loss=hinge", f"norm.backend={backend}", f"trainer.compile={asked}"]
        task = build(model, *words)
        prepare(task)
        torch.manual_seed(1)
        with task.norm_backend():
            found.append([task.train_step(data(task)) for _ in range(20)])
        assert set(task.state_dict()["networks"]) == set(task.networks)
    for a, b in zip(found[0][:5], found[1], strict=False):
        assert all(float(a[key]) == pytest.approx(float(b[key]), rel=1e-2, abs=1e-3) for key in a)
    assert all(value.isfinite() for value in found[1][-1].values())
    assert found[0][-1] != found[0][0]


@pytest.mark.usefixtures("quick_runs")
def test_a_run_has_them_all(tmp_path):
    words = ["trainer.checkpointing=true", "trainer.grad_accum=2", "trainer.steps=3"]
    summary = train(config("cyclegan", *words), tmp_path)
    assert summary["steps"] == 3
