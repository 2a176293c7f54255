"""What test_sync.py lets three processes check: every function runs in all of its group at once.

The reference is always one process's norm on the whole batch, on torch ops.
"""

import copy
import json
import pickle
import traceback
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from parity import BACKENDS, close
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gannorm
from gannorm import use_backend
from gannorm.norms import functional as G
from gannorm.norms import sync

PROCESSES = 3
SPLITS = {2: [(7, 1), (8, 0)], 3: [(5, 0, 3), (2, 3, 3)]}
AFTER = {"residual": True, "residual_after_activation": True}
CASES = {
    "plain": {},
    "silu after": {"activation": "silu", **AFTER},
    "last relu inner": {"activation": "relu", "residual": True, "last": True},
    "flat biased": {"shape": (3,), "var_estimator": "biased"},
    "float32 buffers": {"running": torch.float32, "activation": "leaky_relu"},
    "no affine": {"affine": False, "momentum": 1.0, "shape": (5, 11)},
    "conditional": {"conditional": True, "shape": (5, 4, 3)},
    "conditional silu inner": {"conditional": True, "activation": "silu", "residual": True},
    "conditional last": {"conditional": True, "activation": "leaky_relu", "last": True},
    "conditional planes": {"conditional": True, "activation": "relu", "shape": (2, 67, 71)},
    "rows of planes": {"last": True, "shape": (2, 67, 71)},
}
QUICK = ("silu after", "last relu inner", "conditional")


class Place(NamedTuple):
    rank: int
    size: int
    group: str

    def part(self, split):
        return slice(sum(split[: self.rank]), sum(split[: self.rank + 1]))

    def summed(self, t):
        t = t.detach().clone()
        dist.all_reduce(t, group=sync._group(self.group))
        return t

    def everyone(self, t):
        return sync.gather(t.detach().double().flatten().clone(), sync._group(self.group))


class Kind(NamedTuple):
    """A norm's arguments: whole batches, or a process's part of them."""

    x: torch.Tensor
    residual: torch.Tensor | None
    tables: list
    labels: torch.Tensor
    dy: torch.Tensor
    direction: torch.Tensor  # in which the first derivatives are differentiated
    running: list


def whole(e, n=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    shape = e.get("shape", (5, 4, 3))
    x, r, dy, ddx = (torch.randn(n, *shape, dtype=dtype) for _ in range(4))
    if e.get("last"):
        x, r, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, r, dy))
    rows = (4, shape[0]) if e.get("conditional") else shape[:1]
    tables = [torch.randn(rows, dtype=dtype) if e.get("affine", True) else None for _ in "wb"]
    buffers = [t(shape[0], dtype=e.get("running", dtype)) for t in (torch.zeros, torch.ones)]
    residual = r if e.get("residual") else None
    return Kind(x + 2, residual, tables, torch.randint(4, (n,)), dy, ddx, buffers)


def called(e, kind, group):
    options = {k: e[k] for k in ("activation", "residual_after_activation", "var_estimator")
               if k in e} | {"residual": kind.residual, "process_group": group}  # fmt: skip
    rest = (*kind.running, *kind.tables, True, e.get("momentum", 0.3))
    if e.get("conditional"):
        return G.conditional_batch_norm(kind.x, kind.labels, *rest, **options)
    return G.batch_norm(kind.x, *rest, **options)


def derived(e, kind, part, group=None):
    """y, running statistics, first and second derivatives; what is none is None."""

    def leaf(t):
        return None if t is None else t.clone().requires_grad_()

    own = Kind(
        leaf(kind.x[part]), leaf(None if kind.residual is None else kind.residual[part]),
        [leaf(t) for t in kind.tables], kind.labels[part], leaf(kind.dy[part]),
        kind.direction[part], [t.clone() for t in kind.running],
    )  # fmt: skip
    y = called(e, own, group)
    leaves = [own.x, own.residual, *own.tables]
    there = [t for t in leaves if t is not None]
    first = torch.autograd.grad(y, there, own.dy, create_graph=True)
    target = (first[0] * own.direction).sum()
    for t, g in zip(there, first, strict=True):
        if any(t is one for one in own.tables):  # linear, so that the processes' parts add up
            target = target + (g * t.detach().cos()).sum()
    second = torch.autograd.grad(target, [*there, own.dy], allow_unused=True)
    found = iter(first)
    again = iter(second)
    firsts = [None if t is None else next(found) for t in leaves]
    seconds = [None if t is None else next(again) for t in (*leaves, own.dy)]
    return y, own.running, firsts, seconds


def equals_one_process(place, names, backend):
    with use_backend(backend):
        for split in SPLITS[place.size]:
            for name in names:
                _equal(place, CASES[name], place.part(split))


def _equal(place, e, part):
    kind = whole(e)
    with use_backend("torch"):
        y, running, *wanted = derived(e, kind, slice(None))
    ours, moved, *got = derived(e, kind, part, place.group)
    close(ours, y[part], 1e-10)
    assert not (e.get("last") and len(ours)) or ours.stride()[1] == 1
    for a, b in zip(moved, running, strict=True):
        close(a, b, 1e-6 if b.dtype == torch.float32 else 1e-10)
    for mine, all_ in zip(got, wanted, strict=True):
        for k, (a, b) in enumerate(zip(mine, all_, strict=True)):
            assert (a is None) == (b is None)
            if b is not None:
                close(place.summed(a), b, 1e-10) if k in (2, 3) else close(a, b[part], 1e-10)


def same_bits_everywhere(place, backend):
    """Running statistics in float32, which kernels move, where one batch is empty."""
    torch.manual_seed(0)
    xs = [torch.randn(3 * rank, 7, 5, 3) * 3 - 100 for rank in range(place.size)]
    buffers, wanted = ((torch.zeros(7), torch.ones(7)) for _ in "ab")
    with use_backend(backend):
        G.batch_norm(xs[place.rank], *buffers, training=True, process_group=place.group)
    nn.functional.batch_norm(torch.cat(xs), *wanted, training=True)
    for t, all_ in zip(buffers, wanted, strict=True):
        close(t, all_, 1e-6)
        first, *others = place.everyone(t)
        assert len(others) == place.size - 1 and all(torch.equal(first, o) for o in others)


def magnitudes(place, backend):
    """Far from 0, squares beyond float32, and equal values, which give exactly the bias."""
    split = SPLITS[place.size][0]
    part, w, b = place.part(split), torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    torch.manual_seed(0)
    noise = torch.randn(8, 2, 6, 5)
    with use_backend(backend):
        for x, tolerance in ((noise + 1e6, 5e-6), (noise * 1e30, 1e-5), (noise * 0 + 1e6 / 3, 0)):
            x.requires_grad_()
            exact = x.detach().double().requires_grad_()
            y = G.batch_norm(x[part], None, None, w, b, True, process_group=place.group)
            wanted = G.batch_norm(exact, None, None, w.double(), b.double(), True)
            close(y.double(), wanted[part], tolerance)
            dy = noise.flip(0)
            (dx,) = torch.autograd.grad(y, x, dy[part])
            (dwanted,) = torch.autograd.grad(wanted, exact, dy.double())
            scale = dwanted.abs().max()
            close(dx.double()[part] / scale, dwanted[part] / scale, 1e-4)


@contextmanager
def counting():
    """How often torch.distributed is called, by name."""
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    found = Counter()

    def counted(name, real):
        def call(*args, **kwargs):
            found[name] += 1
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, of in (("all_gather", gather), ("all_reduce", "all_reduce")):
            patch.setattr(dist, of, counted(name, getattr(dist, of)))
        yield found


def collectives(place):
    """One each way; none in evaluation, without dx, on one's own, alone or suspended."""
    x = torch.randn(2 + place.rank, 4, 3, 3, requires_grad=True)
    labels = torch.zeros(len(x), dtype=torch.int64)
    norm = gannorm.ConditionalBatchNorm2d(4, 3)
    gannorm.convert_sync(norm, place.group)
    for backend in BACKENDS:
        with use_backend(backend), counting() as found:
            y = norm(x, labels)
            assert found == {"all_gather": 1}
            y.sum().backward()
            assert found == {"all_gather": 1, "all_reduce": 1}
            norm(x.detach(), labels).sum().backward()
            assert found == {"all_gather": 2, "all_reduce": 1}
    norm.track_running_stats = False
    norm(x, labels).sum().backward()  # the input's own statistics
    bare = gannorm.BatchNorm2d(4, track_running_stats=False)
    with counting() as found:
        for module in (norm, gannorm.convert_sync(bare, place.group)):
            module.eval()(x, *[labels] * (module is norm)).sum().backward()
        norm.train().process_group = None
        norm(x, labels).sum().backward()
        norm.process_group = place.group
        with sync.suspended():
            inside = norm(x, labels)
            inside.sum().backward()
    assert not found and torch.equal(inside, gannorm.norms.functional.conditional_batch_norm(
        x, labels, None, None, norm.weight, norm.bias, True))  # fmt: skip
    y = norm(x, labels)
    with sync.suspended(), pytest.raises(RuntimeError, match="run the forward pass inside too"):
        y.sum().backward()


def net(place=None):
    torch.manual_seed(1)
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(3 * 16, 1),
    ).double()  # fmt: skip
    return made if place is None else gannorm.convert_sync(made, place.group)


def compare_nets(place, ours, theirs, factor=1.0, summed=False):
    """Gradients (ours times `factor`, or summed over processes) and running statistics."""
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(place.summed(a.grad) if summed else a.grad * factor, b.grad, 1e-10)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        close(a, b, 1e-10)


def batches():
    torch.manual_seed(2)
    return [torch.randn(8, 2, 6, 6, dtype=torch.float64) for _ in range(2)]


def under_ddp(place):
    """Two forward passes, then one backward; and a second step."""
    for split in SPLITS[place.size]:
        ours, theirs = net(place), net()
        group = None if place.group == "world" else sync._group(place.group)
        parallel = DistributedDataParallel(ours, process_group=group)
        for _ in range(2):
            real, fake = batches()
            part = place.part(split)
            (parallel(real[part]).exp().sum() + parallel(fake[part]).square().sum()).backward()
            (theirs(real).exp().sum() + theirs(fake).square().sum()).backward()
            compare_nets(place, ours, theirs, place.size)  # DDP takes the mean


def gradient_penalty(place):
    for split in SPLITS[place.size]:
        for reentrant in (None, False):  # and with activations recomputed
            ours, theirs, x = net(place), net(), batches()[0]
            for model, part in ((ours, place.part(split)), (theirs, slice(None))):
                mine = x[part].clone().requires_grad_()
                out = model(mine) if reentrant is None or model is theirs else checkpoint(
                    model, mine, use_reentrant=False)  # fmt: skip
                (dx,) = torch.autograd.grad(out.sum(), mine, create_graph=True)
                (dx.square().sum() + out.sum()).backward()
            compare_nets(place, ours, theirs, summed=True)


def checkpointed(place):
    for reentrant in (True, False):
        ours, theirs, x = net(place), net(), batches()[0]
        mine = x[place.part(SPLITS[place.size][1])].clone().requires_grad_()
        checkpoint(ours, mine, use_reentrant=reentrant).exp().sum().backward()
        theirs(x).exp().sum().backward()
        compare_nets(place, ours, theirs, summed=True)


def compiled(place, backend="torch", split=0):
    """Without a graph break; that a block suspends it is looked at in each call."""
    torch._dynamo.reset()
    e = {"conditional": True, "shape": (4, 3, 3)}
    kind, part = whole(e), place.part(SPLITS[place.size][split])
    ours, theirs = (gannorm.ConditionalBatchNorm2d(4, 4, activation="silu") for _ in "ab")
    theirs.load_state_dict(ours.double().state_dict())
    gannorm.convert_sync(ours, place.group)
    with use_backend(backend):
        run = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=False)
        x, all_ = (t.clone().requires_grad_() for t in (kind.x[part], kind.x))
        with counting() as found:
            y = run(x, kind.labels[part], kind.dy[part])
            (y * kind.dy[part]).sum().backward()
        assert found == {"all_gather": 1, "all_reduce": 1}
        wanted = theirs.double()(all_, kind.labels, kind.dy)
        (wanted * kind.dy).sum().backward()
        close(y, wanted[part], 1e-10)
        close(x.grad, all_.grad[part], 1e-10)
        compare_nets(place, ours, theirs, summed=True)
        with sync.suspended(), counting() as found:
            run(x, kind.labels[part], kind.dy[part])
        assert not found


def plain_average(place):
    for split in SPLITS[place.size]:
        ours, theirs = gannorm.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2, momentum=None)
        gannorm.convert_sync(ours, sync._group(place.group))  # the object itself
        for x in batches():
            ours.double()(x[place.part(split)])
            theirs.double()(x)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            close(a, b, 1e-10)  # the count too, where the part is empty


def few_values(place):
    """No value at all, and one in all: refused by every process, or the bias."""
    bias = torch.tensor([1.0, -2.0])
    for backend in BACKENDS:
        with use_backend(backend):
            mean, var = torch.zeros(2), torch.ones(2)
            x = torch.zeros(0, 2, 3, requires_grad=True)
            y = G.batch_norm(x, mean, var, bias, bias, True, process_group=place.group)
            y.sum().backward()
            assert y.shape == x.grad.shape == x.shape
            assert mean.tolist() == [0, 0] and var.tolist() == [1, 1]
            x = torch.randn(int(place.rank == 1), 2, 1)
            arguments = (x, mean, var, None, bias, True)
            with pytest.raises(ValueError, match="one value per channel in all processes"):
                G.batch_norm(*arguments, process_group=place.group)
            assert mean.tolist() == [0, 0]
            y = G.batch_norm(*arguments, degenerate="beta", process_group=place.group)
            assert torch.equal(y, bias.view(1, 2, 1).expand_as(x))
            x = torch.full((1, 2, 1), float(place.rank))  # one value here, but not in all
            y = G.batch_norm(x, None, None, training=True, process_group=place.group)
            wanted = (place.rank - (place.size - 1) / 2) * (12 / (place.size**2 - 1)) ** 0.5
            close(y, torch.full_like(y, wanted), 1e-4)


def copies(place):
    norm = gannorm.convert_sync(net(), sync._group(place.group))[1]
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert twin.process_group == sync.name_of(sync._group(place.group))
        with counting() as found:
            twin(torch.randn(2, 4, 3, 3).double())
        assert found == {"all_gather": 1}


def refusals(place):
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    norm = gannorm.BatchNorm2d(2, track_running_stats=False)
    gannorm.convert_sync(norm, place.group)
    with pytest.raises(ValueError, match="process_group='nobody' is the name of no group"):
        G.batch_norm(x, None, None, training=True, process_group="nobody")
    with pytest.raises(ValueError, match="no group that this process belongs to"):
        gannorm.convert_sync(norm, "nobody")
    with pytest.raises(TypeError, match="process_group=-100 is no group that this process"):
        gannorm.convert_sync(norm, dist.GroupMember.NON_GROUP_MEMBER)
    dual = torch.autograd.forward_ad
    with counting() as found:
        for refused in (
            lambda: torch.func.grad(lambda x: norm(x).sum())(x),
            lambda: torch.jit.trace(norm, x),
            lambda: torch.export.export(norm, (x,)),
            lambda: torch.func.vmap(norm)(torch.stack((x, x))),
        ):
            with pytest.raises(Exception, match=r"gannorm\.norms\.sync\.suspended"):
                refused()
        with dual.dual_level(), pytest.raises(RuntimeError, match=r"sync\.suspended"):
            norm(dual.make_dual(x, x))
        with sync.suspended():
            torch.func.grad(lambda x: norm(x).sum())(x)
    assert not found
    y = norm(x)
    with pytest.raises(RuntimeError, match=r"is_grads_batched.*suspended"):
        torch.autograd.grad(y, x, torch.stack((y, y)).detach(), is_grads_batched=True)


def _checks():
    found = {"collectives": collectives, "ddp": under_ddp, "penalty": gradient_penalty,
             "checkpoint": checkpointed, "average": plain_average, "few values": few_values,
             "copies": copies, "refusals": refusals, "compile": compiled}  # fmt: skip
    for b in BACKENDS:
        names = QUICK if b == "triton" else CASES
        found |= {
            f"one process, {b}": lambda p, n=names, b=b: equals_one_process(p, n, b),
            f"bits, {b}": lambda p, b=b: same_bits_everywhere(p, b),
            f"magnitudes, {b}": lambda p, b=b: magnitudes(p, b),
        }
    return found


CHECKS = _checks()
SLOW = {
    "every case, triton": lambda p: equals_one_process(p, CASES, "triton"),
    "compile, triton": lambda p: compiled(p, "triton"),
    "compile, empty": lambda p: compiled(p, split=0 if p.size == 3 else 1),
}
ONCE = ("refusals", "copies", "compile", "compile, triton")  # not in both groups
RUNS = [(group, name) for name in (*CHECKS, *SLOW) for group in ("pair", "world")
        if group == "pair" or name not in ONCE]  # fmt: skip


def work(rank, folder, slow):
    """Run the checks in the world, and in a group of two; what came of it is written to `folder`.

    The first that fails is the last: the others wait for what this process has not sent.
    """
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=PROCESSES, timeout=wait
    )
    pair = dist.new_group([0, 2], timeout=wait)
    places = {"world": Place(rank, PROCESSES, "world")}
    if rank != 1:
        places["pair"] = Place(rank // 2, 2, pair.group_name)
    results = {}
    checks = SLOW if slow else CHECKS
    for group, name in RUNS:
        if name not in checks or group not in places or any(results.values()):
            continue
        try:
            checks[name](places[group])
            results[f"{group}, {name}"] = ""
        except BaseException:  # of pytest's own too
            results[f"{group}, {name}"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    if not any(results.values()):
        dist.barrier()
    dist.destroy_process_group()
