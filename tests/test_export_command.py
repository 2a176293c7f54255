"""`python -m gannorm export`: what is written is what was trained, for whoever reads it."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from reference_nets import Discriminator, Generator, four, trained
from safetensors import safe_open
from test_inference import CONDITIONAL, TRANSLATION, command, gannorm, make_run, names, refused
from test_weights import same, same_state

from gannorm.commands.trained import load_task
from gannorm.training import checkpoint, exchange, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
SPECTRAL = [*CONDITIONAL, "norm=batch", "model.g_spectral_norm=true"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run folders by kind, and their tasks."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {
        "instance": (TRANSLATION, None),
        "batch": ([*TRANSLATION, "norm=batch", "model.dropout=true"], None),
        "classes": (CONDITIONAL, 10),
        "spectral": (SPECTRAL, 10),
        "grey": ([*TRANSLATION, "data.channels=1", "model.d_spectral_norm=true"], None),
    }
    return {kind: (root / kind, moved(root / kind, *args)) for kind, args in kinds.items()}


def moved(folder, overrides, classes):
    """The task of a run folder in which every weight and running statistic has moved."""
    run = make_run(folder, overrides, classes)
    nets = [*run.task.networks.values(), *run.task.averaged.values()]
    for seed, net in enumerate(nets):
        if "spectral" not in folder.name and "original" not in "".join(net.state_dict()):
            trained(net, seed)
    checkpoint.save(checkpoint.resolve(folder), run.state_dict())
    return run.task


def inputs_of(kind: str, net: str, sizes: list[tuple[int, int, int]]):
    """For each (images, height, width) the inputs of this network by name."""
    for n, height, width in sizes:
        labels = {"labels": torch.arange(n) * 3 % 10}
        if kind in ("classes", "spectral"):  # whose images have one size
            first = {"z": torch.randn(n, 8)} if net == "G" else {"image": torch.randn(n, 3, 8, 8)}
            yield first | labels
        else:
            yield {"image": torch.rand(n, 1 if kind == "grey" else 3, height, width) * 2 - 1}


TRACED = [
    ("onnx", "instance", "G_A"), ("onnx", "batch", "D_A"), ("onnx", "classes", "G"),
    ("onnx", "spectral", "G"), ("torch-export", "batch", "G_B"), ("torch-export", "grey", "D_B"),
    ("torch-export", "classes", "G"), ("torch-export", "classes", "D"),
]  # fmt: skip


def expected(task, net: str, inputs: dict) -> torch.Tensor:
    module = {**task.averaged, **task.discriminators}[net].eval()
    with torch.no_grad():
        return module(*inputs.values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form,kind,net", TRACED)
def test_other_sizes_than_those_of_the_export(form, kind, net, made, tmp_path):
    folder, task = made[kind]
    out = tmp_path / ("x" + (".onnx" if form == "onnx" else ".pt2"))
    if form == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    gannorm("export", folder, "--format", form, "--net", net, "--out", out)
    assert names(tmp_path) == sorted(["README.md", out.name])
    if form == "onnx":
        session = runtime.InferenceSession(str(out))
        assert session.get_outputs()[0].name == "output"
    else:
        module = torch.export.load(out).module()
    torch.manual_seed(3)
    for inputs in inputs_of(kind, net, [(1, 40, 24), (5, 16, 64), (2, 128, 32)]):
        if form == "onnx":
            fed = {key: value.numpy() for key, value in inputs.items()}
            y = torch.tensor(session.run(None, fed)[0])
        else:
            y = module(*inputs.values())
        wanted = expected(task, net, inputs)
        assert wanted.abs().max() > 1e-2
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)


def test_a_fixed_size(made, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    out = tmp_path / "new" / "x.onnx"
    call = ("export", made["instance"][0], "--format", "onnx", "--net", "G_A", "--out", out)
    gannorm(*call, "--size", "32x48", "--weights", "trained")
    session = runtime.InferenceSession(str(out))
    (given,) = session.get_inputs()
    assert given.shape[1:] == [3, 32, 48] and isinstance(given.shape[0], str)
    x = torch.rand(4, 3, 32, 48) * 2 - 1
    y = torch.tensor(session.run(None, {"image": x.numpy()})[0])
    with torch.no_grad():
        raw = made["instance"][1].generators["G_A"].eval()(x)
    torch.testing.assert_close(y, raw, atol=1e-5, rtol=0)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "| input size | 32x48 |" in card and "| generators | trained |" in card


@pytest.mark.parametrize("kind", ["instance", "batch"])
@pytest.mark.parametrize("net", ["G_A", "G_B", "D_A", "D_B"])
def test_the_reference_code_takes_it_key_for_key(kind, net, made, tmp_path, capsys):
    folder, task = made[kind]
    out = tmp_path / f"latest_net_{net}.pth"
    gannorm("export", folder, "--format", "reference", "--net", net, "--out", out)
    said = capsys.readouterr().out
    m = task.model
    if net[0] == "G":
        theirs = Generator(kind, m.blocks, m.dropout)
        assert f"--norm {kind} --input_nc 3 --output_nc 3 (n_blocks=1) --ngf 4" in said
        assert ("--no_dropout" in said) is not m.dropout
    else:
        theirs = Discriminator(kind, m.d_layers)
        assert "--netD n_layers --n_layers_D 2 --ndf 4" in said
    state = torch.load(out, weights_only=True)
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state, strict=True)
    ours = {**task.averaged, **task.discriminators}[net]
    same(ours, theirs)
    same(load_task(out).networks[net], theirs)


def test_there_and_back(tmp_path, capsys):
    """A network of the reference code's, exported again: the same file."""
    nets = four(tmp_path / "ref", "batch", blocks=6)
    out = tmp_path / "net_G_B.pth"
    gannorm("export", tmp_path / "ref", "--format", "reference", "--net", "G_B", "--out", out)
    before, after = nets["G_B"].state_dict(), torch.load(out, weights_only=True)
    call = ("export", tmp_path / "ref", "--format", "reference", "--net", "G_A", "--out")
    assert "the file to export" in refused(capsys, *call, tmp_path / "ref" / "latest_net_G_B.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "| trained on | unknown |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["instance", "classes", "spectral", "grey"])
def test_safetensors_hold_all_networks_and_their_config(kind, made, tmp_path):
    folder, task = made[kind]
    for use, source in (("averaged", task.averaged), ("trained", task.generators)):
        out = tmp_path / f"{use}.safetensors"
        gannorm("export", folder, "--format", "safetensors", "--weights", use, "--out", out)
        with safe_open(out, "pt") as file:
            said, keys = file.metadata(), set(file.keys())
        assert said["format"] == "gannorm"
        assert json.loads(said["config"])["norm"]["name"] == task.cfg.norm.name
        nets = {**source, **task.discriminators}
        assert keys == {f"{name}.{key}" for name, net in nets.items() for key in net.state_dict()}
        loaded = load_task(out)
        assert loaded.num_classes == task.num_classes
        for name, net in nets.items():
            same_state(loaded.networks[name], net)
        for name in source:
            assert loaded.averaged[name] is loaded.generators[name]


def test_one_network_as_safetensors_and_on_to_another_format(made, tmp_path, capsys):
    folder, task = made["batch"]
    first, second = tmp_path / "b.safetensors", tmp_path / "latest_net_G_B.pth"
    gannorm("export", folder, "--format", "safetensors", "--net", "G_B", "--out", first)
    gannorm("export", first, "--format", "reference", "--out", second)
    same_state(load_task(second).averaged["G_B"], task.averaged["G_B"])
    call = ("export", first, "--format", "safetensors", "--weights", "trained")
    message = refused(capsys, *call, "--out", tmp_path / "c.safetensors")
    assert "holds the averaged generators alone" in message


@pytest.mark.slow
def test_export_as_a_user_runs_it(made, tmp_path, capsys):
    out = tmp_path / "digits.safetensors"
    done = command("export", made["classes"][0], "--format", "safetensors", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"G, D in {out}, described in {tmp_path / 'README.md'}\n"
    shown = tmp_path / "samples"
    gannorm("sample", out, "--count", 2, "--class", 3, "--out", shown)
    gannorm("sample", made["classes"][0], "--count", 2, "--class", 3, "--out", tmp_path / "own")
    for name in names(shown):
        assert (shown / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    with pytest.raises(SystemExit):
        gannorm("export", "--help")
    assert "example: python -m gannorm export" in capsys.readouterr().out


# ---- the model card


@pytest.mark.parametrize(
    "form,suffix", [("safetensors", "safetensors"), ("onnx", "onnx"), ("torch-export", "pt2"),
                    ("reference", "pth")],
)  # fmt: skip
def test_the_card_loads_the_file(form, suffix, made, tmp_path, monkeypatch):
    """Its code, run where it lies."""
    gannorm("export", made["batch"][0], "--format", form, "--net", "G_A", "--out",
            tmp_path / f"latest_net_G_A.{suffix}")  # fmt: skip
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "library_name": "gannorm", "pipeline_tag": "image-to-image",
        "tags": ["gan", "image-to-image"],
    }  # fmt: skip
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(config)["model"]["dropout"] is True
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    if "output" in scope:
        assert np.asarray(scope["output"].detach() if form != "onnx" else scope["output"]).ndim == 4
    else:
        same_state(scope["net"], made["batch"][1].averaged["G_A"])


def test_the_card_has_the_figures_of_the_run(made, tmp_path):
    summary = {
        "steps": 1, "quality": {"fid_AtoB": 12.345678, "class_fid/3": 9.0},
        "best": {"figure": "fid", "value": 11.0, "step": 1},
    }  # fmt: skip
    folder, _ = made["grey"]
    (folder / "summary.json").write_text(json.dumps(summary))
    call = ("export", folder, "--format", "safetensors", "--out")
    gannorm(*call, tmp_path / "x.safetensors")
    text = (tmp_path / "README.md").read_text()
    assert re.search(r"\| fid_AtoB \| 12\.3\d* \|", text) and "class_fid" not in text
    assert "| norm | `instance` |" in text and "| training step | 1 |" in text
    gannorm(*call, tmp_path / "y.safetensors")  # the README is there
    assert names(tmp_path) == ["README.md", "x.safetensors", "y.md", "y.safetensors"]
    assert (tmp_path / "README.md").read_text() == text
    assert "# y.safetensors" in (tmp_path / "y.md").read_text()
    gannorm(*call, tmp_path / "y.safetensors")  # again


def test_no_folder_of_this_machine_is_published(tmp_path):
    make_run(tmp_path / "run", [*TRANSLATION, "data=folder_pair", "data.root=/home/me/secret",
             "init_from.path=/home/me/secret.pth", "data.image_size=32"], None)  # fmt: skip
    out = tmp_path / "x.safetensors"
    gannorm("export", tmp_path / "run", "--format", "safetensors", "--out", out)
    assert b"secret" not in out.read_bytes()
    assert "secret" not in (tmp_path / "README.md").read_text()
    assert "`folder_pair`, 32x32 pixels" in (tmp_path / "README.md").read_text()
    gannorm("translate", out, *_images(tmp_path), "--direction", "BtoA")


def _images(folder):
    from PIL import Image

    (folder / "in").mkdir()
    Image.new("RGB", (20, 30)).save(folder / "in" / "x.png")
    return folder / "in", folder / "out"


# ---- refusals


@pytest.mark.parametrize(
    "kind,args,words",
    [
        ("instance", "--format onnx --out x.pth", "ends in .onnx"),
        ("instance", "--format onnx --out x.onnx", "holds G_A, G_B, D_A, D_B; choose one"),
        ("instance", "--format onnx --out x.onnx --net G", "--net G: "),
        ("instance", "--format onnx --out x.onnx --net G_A --size 30x32", "multiples of 4 from 16"),
        ("instance", "--format onnx --out x.onnx --net G_A --size 8x32", "multiples of 4 from 16"),
        ("instance", "--format onnx --out x.onnx --net G_A --size big", "--size big"),
        ("instance", "--format onnx --out x.onnx --net G_A --size 0x4", "--size 0x4"),
        ("classes", "--format torch-export --out x.pt2 --size 8x8", "images of one size"),
        ("classes", "--format reference --out x.pth", "this is a resblock_gan"),
        ("instance", "--format reference --out x.pth --net G_A --size 8x8", "have no size"),
        ("grey", "--format reference --out x.pth --net D_A", "model.d_spectral_norm=true"),
        ("instance", "--format reference --out x.pth", "choose one"),
    ],
)
def test_export_refusals(kind, args, words, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "export", made[kind][0], *args.split())
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "override,words",
    [
        ("norm=group", "no norm=group"),
        ("norm=layer", "no norm=layer"),
        ("norm=none", "no norm=none"),
        ("norm.affine=true", "no norm=instance with norm.affine=True"),
        ("norm.eps=1e-3", "no norm.eps=0.001"),
        ("model.downsamplings=1", "no model.downsamplings=1"),
    ],
)
def test_what_the_reference_code_has_not(override, words, tmp_path, capsys):
    make_run(tmp_path / "run", [*TRANSLATION, override], None)
    call = ("export", tmp_path / "run", "--format", "reference", "--net", "G_A", "--out")
    assert words in refused(capsys, *call, tmp_path / "out" / "x.pth")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(made, tmp_path, capsys):
    folder, _ = made["instance"]
    call = ("export", folder, "--format", "safetensors", "--out")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "x.md").write_text("mine too")
    assert "x.md, where the model card" in refused(capsys, *call, tmp_path / "x.safetensors")
    gannorm(*call, tmp_path / "y.safetensors")
    again = ("export", tmp_path / "y.safetensors", *call[2:], tmp_path / "y.safetensors")
    assert "the file to export" in refused(capsys, *again)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("form,name", [("onnx", "x.onnx"), ("torch-export", "x.pt2")])
def test_a_file_that_computes_something_else_gets_no_name(form, name, made, tmp_path, monkeypatch):
    """A network that is another one each time."""
    kind = exchange.ResBlockGANConfig
    assert isinstance(made["classes"][1].model, kind)

    def drifting(task, which, net, size, real=exchange.traced):
        net = real(task, which, net, size)
        net.net.register_forward_hook(lambda module, _, y: y if _graph() else y + 1e-3)
        return net

    def _graph() -> bool:
        return torch.compiler.is_compiling()

    monkeypatch.setattr(exchange, "traced", drifting)
    call = ("export", made["classes"][0], "--format", form, "--net", "G", "--out", tmp_path / name)
    with pytest.raises(RuntimeError, match="differs by 1"):
        gannorm(*call)
    assert not names(tmp_path)


def test_the_packages_of_onnx_are_asked_for(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exchange, "find_spec", lambda name: None if name == "onnx" else name)
    call = ("export", made["instance"][0], "--format", "onnx", "--net", "G_A", "--out")
    message = refused(capsys, *call, tmp_path / "x.onnx")
    assert 'needs onnx: pip install -e ".[onnx]"' in message and not names(tmp_path)


def test_what_is_read_is_what_was_written(made):
    """`weights.tensors` shares no memory with the networks."""
    net = made["instance"][1].generators["G_A"]
    copied = weights.tensors({"G_A": net})
    pointers = {p.data_ptr() for p in net.parameters()}
    assert not pointers & {t.data_ptr() for t in copied.values()}
