"""`trainer.cuda_graph=true` as far as there is no GPU: what is captured runs as it is."""

import pytest
import torch
from test_tasks import SIZES, build, data, parameters

from benchmarks.gpu import whole
from benchmarks.gpu.engine import Context
from gannorm.tasks.graph import WARM_UP, GraphedStep
from gannorm.training.options import stepping

EXTRA = {"cyclegan": ["model.pool_size=6", "optim.d_steps=2"], "resblock_gan": ["optim.d_steps=2"]}


def graphed(model, *more):
    return build(model, *EXTRA[model], "trainer.cuda_graph=true", *more)


@pytest.mark.usefixtures("in_float64")  # in which a rate is the same number as a tensor
@pytest.mark.parametrize("model", SIZES)
def test_a_graph_trains_alike(model):
    """Buffers, tensors for rates and choices made ahead: the same bits, pools included."""
    ends = []
    for task in (build(model, *EXTRA[model]), graphed(model)):
        take = stepping(task)
        assert isinstance(take, GraphedStep) == task.cfg.trainer.cuda_graph
        torch.manual_seed(1)
        steps = [data(task) for _ in range(8)]
        torch.manual_seed(2)
        losses = []
        for number, step in enumerate(steps):
            task.set_learning_rates(40 * number)
            losses.append(take(step))
        pools = [pool.images for pool in getattr(task, "pools", {}).values()]
        ends.append((losses, parameters(task), pools, torch.rand(())))
    (losses, weights, pools, after), (again, others, other_pools, after_others) = ends
    assert losses == again and after == after_others
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(map(torch.equal, pools, other_pools))


def test_it_is_captured_once_pools_are_full(monkeypatch):
    task = build("cyclegan", "model.pool_size=19", "trainer.cuda_graph=true")
    take, captured = GraphedStep(task), []
    capture = take._capture
    monkeypatch.setattr(take, "_capture", lambda: (captured.append(take.steps), capture()))
    for _ in range(8):
        take(data(task))
    assert captured == [5] and WARM_UP < 5  # 4 images a step
    assert take.taken[0][0]["image"].is_contiguous(memory_format=task.memory_format)


def test_what_a_step_returns_outlives_the_next():
    task = graphed("resblock_gan")
    take = GraphedStep(task)
    run = take._run

    def in_place():  # as a replay does
        values = take.values
        run()
        take.values = values.copy_(take.values) if len(values) else take.values

    take._run = in_place
    losses = [take(data(task)) for _ in range(6)]
    seen = [{name: float(value) for name, value in each.items()} for each in losses]
    take(data(task))
    assert seen == [{name: float(value) for name, value in each.items()} for each in losses]
    assert len({each["D"] for each in seen}) == 6


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("first, then", [(True, False), (False, True)])
def test_a_checkpoint_goes_on_with_a_graph_or_without(model, first, then, tmp_path):
    make = {True: graphed, False: lambda model: build(model, *EXTRA[model])}
    task = make[first](model)
    task.set_learning_rates(700)
    rate = task.optimizers["G"].param_groups[0]["lr"]
    for _ in range(3):
        task.train_step(data(task))
    torch.save(task.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(state["optimizers"]["G"]["param_groups"][0]["lr"]) is float
    ends = []
    for kind in (first, then):
        other = make[kind](model)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        group = other.optimizers["G"].param_groups[0]
        assert isinstance(group["lr"], torch.Tensor) == kind
        assert float(group["lr"]) == pytest.approx(float(rate)) and rate < 2e-3
        torch.manual_seed(4)
        other.train_step(data(other))
        ends.append(parameters(other))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_choices_that_were_not_taken_are_forgotten(monkeypatch):
    """A step that fails leaves none behind: run again, it draws its own."""
    task = graphed("cyclegan")
    take = GraphedStep(task)
    for _ in range(5):
        take(data(task))

    def fail(taken):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(task, "train_step", fail)
        take(data(task))
    assert all(pool.given == [] for pool in task.pools.values())


def test_the_check_on_a_gpu_finds_a_graph_that_takes_no_new_images(monkeypatch, tmp_path):
    context = Context(tmp_path, True)
    names = [name for name in whole.run_items(context) if name.endswith(whole.GRAPHED)]
    assert len(names) == 2 and whole.run_run(names[0], context)["wrong"] == ""
    take = GraphedStep._take
    monkeypatch.setattr(GraphedStep, "_take", lambda s, taken: s.graph or take(s, taken))
    assert "without a graph" in whole.run_run(names[0], context)["wrong"]
