"""`python -m gannorm inspect`, of checkpoints and of configs."""

import pytest
import torch
from test_inference import CONDITIONAL, TRANSLATION, command, gannorm, make_run, refused

from gannorm.training import checkpoint


def rows(text: str) -> dict[str, list[str]]:
    """Cells by layer, under the title and the head."""
    lines = [line.split("  ") for line in text.splitlines()[2:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {name: rest for name, *rest in cells}


@pytest.mark.slow
def test_a_config_as_a_user_inspects_it(capsys):
    done = command("inspect", "norm=batch", "data.batch_size=3")
    assert done.returncode == 0, done.stderr
    title, head, *_ = done.stdout.splitlines()
    assert title.startswith("cyclegan, norm batch, batch 3 of 32x32") and "verdict" in head
    found = rows(done.stdout)
    assert found["G_A.model.2"][:3] == ["BatchNorm2d", "16", str(3 * 32 * 32)]
    assert found["D_B.model.6"][:3] == ["BatchNorm2d", "128", str(3 * 7 * 7)]
    assert len(found) == 2 * 11 + 2 * 2 and all(cells[-1] == "ok" for cells in found.values())
    assert "did you mean instance?" in refused(capsys, "inspect", "norm=instnce")


@pytest.mark.parametrize(
    "norm,kind,values",
    [
        ("instance", "InstanceNorm2d", 1024),
        ("layer", "LayerNorm2d", 16 * 1024),
        ("group", "GroupNorm", 2 * 1024),
    ],
)
def test_values_per_statistic(norm, kind, values, capsys):
    gannorm("inspect", f"norm={norm}")
    assert rows(capsys.readouterr().out)["G_A.model.2"][:3] == [kind, "16", str(values)]


def test_the_default_config_and_none(capsys):
    gannorm("inspect")
    assert "cyclegan, norm instance" in capsys.readouterr().out
    gannorm("inspect", "norm=none")
    assert capsys.readouterr().out.splitlines()[1] == "no norm layers"


def test_checkpoints(tmp_path, capsys):
    run = make_run(tmp_path / "a", CONDITIONAL, 10)
    g = run.task.generators["G"]
    with torch.no_grad():
        g.blocks[0].norm2.weight.zero_()
        g.norm.weight.fill_(5e3)
        for net in (g, run.task.averaged["G"]):
            net.blocks[0].norm1.running_var.fill_(1e6)
    file = tmp_path / "a" / "checkpoints" / "step_00000001.pt"
    checkpoint.save(file, run.state_dict())
    for path in (tmp_path / "a", file):
        gannorm("inspect", path)
        found = rows(capsys.readouterr().out)
        assert found["G.blocks.0.norm2"][-1] == "dead weights: 100% below 0.001"
        assert found["G.norm"][-1] == "exploding: weight up to 5.0e+03"
        # Measured on samples of the averaged generator.
        assert "far from the batch's (" in found["averaged.G.blocks.0.norm1"][-1]
        assert found["G.blocks.0.norm1"][-1] == "ok"
        assert "1e+06" in found["G.blocks.0.norm1"]
    make_run(tmp_path / "b", TRANSLATION, None)
    gannorm("inspect", tmp_path / "b")
    assert {name.partition(".")[0] for name in rows(capsys.readouterr().out)} == {
        "G_A", "G_B", "D_A", "D_B", "averaged",
    }  # fmt: skip


@pytest.mark.parametrize(
    "what,words",
    [
        (["nowhere"], "no checkpoint or run folder nowhere"),
        (["a", "b"], "one checkpoint or run folder"),
        (["a", "norm=batch"], "one checkpoint or run folder"),
        (["nrom=batch"], "did you mean norm?"),
        (["trainer.steps=many"], "trainer.steps"),
        (["norm=conditional_batch"], "choose norm= instance"),
        (["data=digits"], "choose data= digits_m"),
        (["norm=instance", "data.image_size=8"], "one value per plane"),
        (["norm=null"], "string"),
        (["data=folder_pair"], "data.root"),
    ],
)
def test_refused(what, words, capsys):
    assert words in refused(capsys, "inspect", *what)


def test_no_download(capsys):
    gannorm("inspect", "experiment=sngan_cifar10", "model.d_widths=[8,8]")
    assert rows(capsys.readouterr().out)["G.norm"][:3] == ["BatchNorm2d", "256", str(64 * 1024)]
