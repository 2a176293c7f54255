"""Networks from files (the reference CycleGAN code's, safetensors, checkpoints), and init_from."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from reference_nets import Discriminator, Generator, four, plain, save, trained
from safetensors.torch import save_file
from test_inference import (
    CONDITIONAL,
    ROOT,
    TRANSLATION,
    command,
    gannorm,
    levels,
    make_run,
    pixels,
    refused,
)
from torch import nn

from gannorm.commands.composition import composed, spelled_out
from gannorm.commands.trained import load_task
from gannorm.config import typed
from gannorm.errors import RequestError
from gannorm.tasks import build_task
from gannorm.training import checkpoint, weights
from gannorm.training.loop import train

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
SIZES = ["model.width=4", "model.blocks=1", "model.d_width=4", "model.d_layers=3"]


def task_of(*overrides: str):
    torch.manual_seed(1)
    return build_task(typed(composed(list(overrides))), torch.device("cpu"), 10)


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """The same outputs, in float64: what is asked is whether they are the same network."""
    ours, theirs = (copy.deepcopy(net).double().eval() for net in (ours, theirs))
    with torch.no_grad():
        expected = theirs(X.double())
        assert expected.std() > 0.05  # an output that depends on the weights
        torch.testing.assert_close(ours(X.double()), expected, atol=1e-9, rtol=1e-9)


# ---- files of the reference code


@pytest.mark.parametrize(
    "kind,blocks,dropout,prefix,old",
    [
        ("instance", 9, False, "", False),
        ("instance", 6, True, "module.", True),
        ("batch", 6, False, "module.", False),
        ("batch", 9, True, "", True),
        ("old", 9, False, "", True),
        ("old", 6, True, "", False),
    ],
)
def test_a_generator_of_the_reference_code(kind, blocks, dropout, prefix, old, tmp_path):
    net = trained(Generator(kind, blocks, dropout))
    save(net, tmp_path / "latest_net_G.pth", prefix, old)
    task = load_task(tmp_path / "latest_net_G.pth", "cyclegan")
    assert list(task.networks) == ["G_A"]
    m, norm = task.model, task.cfg.norm.name
    assert (m.width, m.blocks, m.downsamplings, m.dropout) == (4, blocks, 2, dropout)
    assert norm == ("batch" if kind == "batch" else "instance")
    same(task.averaged["G_A"], plain(net))


@pytest.mark.parametrize("kind,layers", [("instance", 3), ("batch", 2), ("old", 5), ("batch", 1)])
def test_a_discriminator_of_the_reference_code(kind, layers, tmp_path):
    net = trained(Discriminator(kind, layers))
    save(net, tmp_path / "40_net_D_B.pth")
    task = load_task(tmp_path / "40_net_D_B.pth")
    assert list(task.networks) == ["D_B"] and not task.averaged
    if layers == 5:  # at 32 pixels nothing would be left
        return
    same(task.discriminators["D_B"], plain(net))


def test_a_folder_of_the_reference_code(tmp_path, capsys):
    nets = four(tmp_path / "run", "batch")
    for name in ("G_A", "D_A"):  # of another epoch, and of other kinds
        save(nets["G_B"], tmp_path / "run" / f"5_net_{name}.pth")
    (tmp_path / "run" / "loss_log.txt").touch()
    task = load_task(tmp_path / "run")
    assert set(task.networks) == set(nets) and set(task.averaged) == {"G_A", "G_B"}
    for name, net in nets.items():
        same(task.networks[name], net)
    for name in nets:
        (tmp_path / "run" / f"latest_net_{name}.pth").rename(
            tmp_path / "run" / f"{'100' if name[0] == 'G' else '5'}_net_{name}.pth"
        )
    assert set(load_task(tmp_path / "run").networks) == {"G_A", "G_B"}  # epoch 100, and not 5
    gannorm("inspect", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "cyclegan, norm batch" in printed and "G_B.model.2 " in printed
    assert "averaged" not in printed and "D_A" not in printed


@pytest.mark.slow
def test_translate_with_files_of_the_reference_code(tmp_path, capsys):
    """As a user does, with a folder; a single file has one direction."""
    nets = four(tmp_path / "run")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "x.png")
    done = command(
        "translate", tmp_path / "run", tmp_path / "in", tmp_path / "out", "--direction", "BtoA"
    )
    assert done.returncode == 0, done.stderr
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert np.abs(pixels(tmp_path / "out" / "x.png") - levels(nets["G_B"](x))[0]).max() < 2
    shutil.copy(tmp_path / "run" / "latest_net_G_A.pth", tmp_path / "horse2zebra.pth")
    call = ["translate", tmp_path / "horse2zebra.pth", tmp_path / "in", tmp_path / "A"]
    gannorm(*call, "--direction", "AtoB")
    assert np.abs(pixels(tmp_path / "A" / "x.png") - levels(nets["G_A"](x))[0]).max() < 2
    call[-1] = tmp_path / "B"
    assert "holds G_A and no G_B" in refused(capsys, *call, "--direction", "BtoA")
    assert not (tmp_path / "B").exists()


def test_safetensors_of_others(tmp_path):
    nets = four(tmp_path / "run", "batch")
    save_file(nets["G_A"].state_dict(), tmp_path / "one.safetensors")
    all_of_them = {f"{n}.{k}": v for n, net in nets.items() for k, v in net.state_dict().items()}
    save_file(all_of_them, tmp_path / "all.safetensors")
    same(load_task(tmp_path / "one.safetensors").averaged["G_A"], nets["G_A"])
    task = load_task(tmp_path / "all.safetensors")
    for name, net in nets.items():
        same(task.networks[name], net)


def code():
    """What runs when it is unpickled."""
    return Generator("instance", 1)


def bias(net: nn.Module) -> dict:
    return {k: v for k, v in net.state_dict().items() if not k.endswith("bias")}


def instance_with_weights() -> dict:
    net = Generator("batch", 1)
    return {k: v for k, v in net.state_dict().items() if "running" not in k and "num" not in k}


UNET = {"model.model.0.weight": torch.zeros(4, 3, 4, 4), "model.model.1.bias": torch.zeros(3)}
ZERO_PADDED = {
    f"model.{key}.weight": torch.zeros(4, 4, size, size)
    for key, size in (("1", 7), ("4", 3), ("10.conv_block.0", 3), ("19", 3), ("26", 7))
}


@pytest.mark.parametrize(
    "content,words",
    [
        (code, "code of its own, which is not run"),
        (lambda: [1, 2], "holds no networks"),
        (dict, "holds no networks"),
        (lambda: {"epoch": 3, "model": {}}, "'epoch' is a int"),
        (lambda: UNET, "keys begin with model.model.0.weight"),
        (lambda: ZERO_PADDED, "reflection-padded"),
        (lambda: bias(Generator("instance", 1)), "no norm at all"),
        (instance_with_weights, "weights and no running statistics"),
        (lambda: {"format": 99, "task": {}}, "by a newer gannorm (format 99; this one reads"),
        (lambda: Generator("instance", 1, channels=4).state_dict(), "data.channels"),
        (lambda: {**Generator("batch", 1).state_dict(), "model.9.x": X}, "model.9.x is in the"),
    ],
)
def test_files_that_are_refused(content, words, tmp_path, capsys):
    path = tmp_path / "latest_net_G_A.pth"
    torch.save(content(), path)
    message = refused(capsys, "inspect", path)
    assert words in message and (str(path) in message or "data.channels" in message)


def test_folders_and_safetensors_that_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no latest_net_G_A.pth" in refused(capsys, "inspect", tmp_path / "empty")
    save(Discriminator("batch"), tmp_path / "d" / "latest_net_D.pth")
    assert "no latest_net_G_A.pth" in refused(capsys, "inspect", tmp_path / "d")
    for name, net in (("G_A", Generator("batch", 1)), ("G_B", Generator("batch", 1, width=8))):
        save(net, tmp_path / "two" / f"latest_net_{name}.pth")
    assert "model.width is 4 and 8" in refused(capsys, "inspect", tmp_path / "two")
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    assert "x.safetensors is not a safetensors" in refused(
        capsys, "inspect", tmp_path / "x.safetensors"
    )
    save_file({"G.x": X}, tmp_path / "x.safetensors", {"format": "gannorm", "config": "{"})
    assert "no JSON" in refused(capsys, "inspect", tmp_path / "x.safetensors")
    save_file({"G.x": X}, tmp_path / "x.safetensors")
    assert "needs its config" in refused(capsys, "inspect", tmp_path / "x.safetensors")


def test_no_code_is_run(tmp_path, capsys):
    """A pickle that would make a file."""

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model.1.weight": Harmful()}, tmp_path / "latest_net_G_A.pth")
    refused(capsys, "inspect", tmp_path / "latest_net_G_A.pth")
    assert not (tmp_path / "made").exists()


# ---- init_from


def test_the_short_form():
    given = ["norm=batch", "init_from=a/b.pth", "init_from.use=trained", "init_from={path:x}"]
    assert spelled_out(given) == [given[0], "init_from.path=a/b.pth", *given[2:]]
    cfg = typed(composed(["init_from=a/b c.pth", "init_from.strict=false"])).init_from
    assert (cfg.path, cfg.use, cfg.strict) == ("a/b c.pth", "averaged", False)
    assert typed(composed(["init_from=null"])).init_from.path is None
    with pytest.raises(RequestError, match="averaged, trained"):
        typed(composed(["init_from.use=best"]))


def test_any_path_that_is_there(tmp_path):
    for name in ("a=b, c.pth", "it's (1).pth", "[x]{y}.pth", "plain.pth"):
        (tmp_path / name).touch()
        path = str(tmp_path / name)
        assert typed(composed([f"init_from={path}"])).init_from.path == path


@pytest.mark.slow
def test_a_run_that_begins_with_networks_of_the_reference_code(tmp_path):
    """As a user starts it: the weights then lie within the few steps' reach of those of the file,
    and have moved."""
    nets, rate, steps = four(tmp_path / "ref"), 1e-4, 3
    options = [f"trainer.steps={steps}", "data.image_size=24", "data.batch_size=2"]
    options += [f"optim.lr_g={rate}", f"optim.lr_d={rate}", "optim.decay_from=1"]
    done = subprocess.run(
        [sys.executable, "train.py", *SIZES, *options, f"init_from={tmp_path / 'ref'}",
         f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"weights of G_A, G_B, D_A, D_B from {tmp_path / 'ref'}" in done.stdout
    assert "loss/G_A" in (tmp_path / "run" / "metrics.jsonl").read_text()
    task = checkpoint.load(checkpoint.resolve(tmp_path / "run"))["task"]
    kind = "networks"
    for name in nets:
        for key, value in nets[name].state_dict().items():
            moved = (task[kind][name][key] - value).abs().max()
            assert moved <= 1.5 * rate * steps, (name, key)
        first = f"model.{int(name[0] == 'G')}.weight"
        assert not torch.equal(task[kind][name][first], nets[name].state_dict()[first])


def test_which_weights_are_taken(tmp_path):
    """Of a checkpoint the averaged generators, or the trained; of both the averages are copies."""
    run = make_run(tmp_path / "run", TRANSLATION, None).task
    for use, source in (("averaged", run.averaged), ("trained", run.generators)):
        task = task_of(*TRANSLATION, "optim.lr_g=1e-5", f"init_from.use={use}",
                       f"init_from={tmp_path / 'run'}")  # fmt: skip
        rng = torch.get_rng_state()
        said = weights.start(task, task.cfg.init_from)
        assert torch.equal(rng, torch.get_rng_state()) and len(said) == 1
        for name in task.generators:
            same_state(task.generators[name], source[name])
            same_state(task.averaged[name], source[name])
            trained = [p.requires_grad for p in task.generators[name].parameters()]
            assert trained == [p.requires_grad for p in run.generators[name].parameters()]
        for name, net in task.discriminators.items():
            same_state(net, run.discriminators[name])


def same_state(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_conditional_networks(tmp_path):
    run = make_run(tmp_path / "run", CONDITIONAL, 10).task
    task = task_of(*CONDITIONAL, f"init_from={tmp_path / 'run'}")
    weights.start(task, task.cfg.init_from)
    same_state(task.generators["G"], run.averaged["G"])
    same_state(task.discriminators["D"], run.discriminators["D"])


def test_one_generator_leaves_the_others_fresh(tmp_path):
    net = trained(Generator("instance", 1))
    save(net, tmp_path / "horse2zebra.pth")
    task, fresh = (task_of(*SIZES, f"init_from={tmp_path / 'horse2zebra.pth'}") for _ in range(2))
    said = weights.start(task, task.cfg.init_from)
    assert said[0].startswith("weights of G_A from ")
    assert said[1] == "fresh weights: G_B, D_A, D_B"
    same(task.averaged["G_A"], net)
    for name in ("G_B", "D_A", "D_B"):
        same_state(task.networks[name], fresh.networks[name])


def test_what_does_not_fit_is_named(tmp_path):
    save(trained(Generator("instance", 2)), tmp_path / "latest_net_G_A.pth")
    path = f"init_from={tmp_path / 'latest_net_G_A.pth'}"
    task, fresh = (task_of("model.width=6", "model.blocks=1", path) for _ in range(2))
    with pytest.raises(RequestError) as caught:
        weights.start(task, task.cfg.init_from)
    message = str(caught.value)
    assert "G_A.model.1.weight is (4, 3, 7, 7) in the file, (6, 3, 7, 7) here" in message
    assert re.search(r" and \d+ more; the file is of .*model.width=4 model.blocks=2 ", message)
    assert "init_from.strict=false" in message and "\n" not in message
    assert message.count(" in the file, ") <= 10
    same_state(task.generators["G_A"], fresh.generators["G_A"])

    task, fresh = (task_of("model.width=4", "model.blocks=1", path) for _ in range(2))
    with pytest.raises(RequestError) as caught:
        weights.start(task, task.cfg.init_from)
    assert "G_A.model.11.conv_block.1.weight is in the file only" in str(caught.value)
    assert "G_A.model.11.weight is missing in the file" in str(caught.value)
    task = task_of("model.width=4", "model.blocks=1", path, "init_from.strict=false")
    said = weights.start(task, task.cfg.init_from)
    assert "left as it was: G_A.model.11.weight is missing in the file" in said
    file = torch.load(tmp_path / "latest_net_G_A.pth")
    now = task.averaged["G_A"].state_dict()
    assert torch.equal(now["model.10.conv_block.5.weight"], file["model.10.conv_block.5.weight"])
    was = fresh.generators["G_A"].state_dict()["model.11.weight"]
    assert torch.equal(now["model.11.weight"], was)


@pytest.mark.parametrize("kind", [CONDITIONAL, None])
def test_networks_of_another_model_are_refused(kind, tmp_path):
    if kind:
        make_run(tmp_path / "x", kind, 10)
        task = task_of(*TRANSLATION, f"init_from={tmp_path / 'x'}")
    else:
        four(tmp_path / "x")
        task = task_of(*CONDITIONAL, f"init_from={tmp_path / 'x'}")
    with pytest.raises(RequestError, match=r"holds the networks .*; model=\w+ has "):
        weights.start(task, task.cfg.init_from)


def test_a_resumed_run_does_not_begin_again(tmp_path, quick_runs, capsys):
    """And its file may be gone, or another."""
    four(tmp_path / "ref")
    run, few = tmp_path / "run", [*SIZES, "data.batch_size=2", "trainer.eval_every=9"]

    def go(*more: str) -> str:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", spelled_out([*few, "resume=auto", *more]))
        train(cfg, run)
        return capsys.readouterr().out

    assert "weights of G_A" in go("trainer.steps=1", f"init_from={tmp_path / 'ref'}")
    before = checkpoint.load(checkpoint.resolve(run))["task"]["averaged"]["G_A"]["model.1.weight"]
    shutil.rmtree(tmp_path / "ref")
    said = go("trainer.steps=2", "init_from=elsewhere.pth", "optim.lr_g=6e-4")
    assert "weights of" not in said and "continued from" in said
    after = checkpoint.load(checkpoint.resolve(run))["task"]["averaged"]["G_A"]["model.1.weight"]
    assert 0 < (after - before).abs().max() < 1e-2


def test_a_missing_file_is_refused_before_anything_is_written(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*SIZES, "init_from.path=nowhere.pth"])
    with pytest.raises(RequestError, match=r"no checkpoint or run folder nowhere\.pth"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_inspect_shows_what_a_run_would_begin_with(tmp_path, capsys):
    save(trained(Generator("batch", 1)), tmp_path / "latest_net_G_A.pth")
    gannorm("inspect", f"init_from={tmp_path / 'latest_net_G_A.pth'}", "norm=batch", *SIZES)
    lines = capsys.readouterr().out.splitlines()
    (a,) = (line for line in lines if line.startswith("G_A.model.2 "))
    (b,) = (line for line in lines if line.startswith("G_B.model.2 "))
    assert a.split()[4:] != b.split()[4:]


def test_checkpoints_of_older_versions_have_no_init_from(tmp_path):
    make_run(tmp_path / "run", TRANSLATION, None)
    path = checkpoint.resolve(tmp_path / "run")
    state = checkpoint.load(path)
    del state["config"]["init_from"]
    checkpoint.save(path, state)
    assert load_task(tmp_path / "run").cfg.init_from.path is None
    assert json.dumps(state["config"])
