"""train.py as a user runs it: run folders, refusals in one line, multirun, the kernels' losses."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CYCLEGAN = [
    "data.image_size=8", "data.batch_size=2", "model.width=4", "model.blocks=1", "model.d_width=4",
    "model.downsamplings=1", "model.d_layers=1", "trainer.steps=2",
]  # fmt: skip
RESBLOCK = [
    "model=resblock_gan", "data.image_size=8", "data.batch_size=2", "model.g_widths=[8,8]",
    "model.d_widths=[8,8]", "model.d_downsamplings=2", "trainer.steps=2",
]  # fmt: skip

SETS = [
    "fid", "kid", "inception_score", "precision", "recall", "density", "coverage", "accuracy",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user on a machine without a GPU; conftest has set TRITON_INTERPRET here."""
    command = [sys.executable, "train.py", *arguments]
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**own, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


# Processes that have imported already what takes longer than all the rest.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "torch.utils.tensorboard", "torchvision.transforms.v2", "sklearn.datasets", "sklearn.cluster",
    "torchmetrics", "matplotlib.figure", "hydra", "pytest",
])  # fmt: skip


def as_user(arguments: list[str], said: Path, interpret: bool) -> None:
    """The body of a process: train.py, its output in files, no GPU."""
    os.chdir(ROOT)
    os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, sys.path[:0] = ["train.py", *arguments], [str(ROOT)]
    runpy.run_path("train.py", run_name="__main__")


def forked(
    *arguments: str, said: Path, interpret: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `run` does, sooner; what is printed goes through files in `said`."""
    said.mkdir(exist_ok=True)
    process = FORKS.Process(target=as_user, args=(list(arguments), said, interpret))
    process.start()
    process.join()
    assert process.exitcode is not None
    texts = [(said / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def check_run(folder: Path, steps: int) -> dict:
    """A finished run's files; its summary."""
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    events = [name for name in names if name.startswith("events.out.tfevents.")]
    assert len(events) == 1
    assert names - {*events, "checkpoints/best.pt"} == {
        ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "metrics.jsonl",
        f"checkpoints/step_{steps:08d}.pt", "samples/step_00000000.png",
        f"samples/step_{steps:08d}.png", "summary.json",
    }  # fmt: skip
    with Image.open(folder / f"samples/step_{steps:08d}.png") as image:
        assert np.asarray(image).std() > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == steps and summary["seed"] == 0 and summary["quality"]
    assert all(np.isfinite(v) for v in summary["quality"].values())
    return summary


# ---- runs that work


def test_cyclegan(tmp_path: Path, refused):
    folder = tmp_path / "run"
    done = run(*CYCLEGAN, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    summary = check_run(folder, 2)
    pairs = {f"cycle_{name}_{end}" for name in ("l1", "psnr", "ssim") for end in "AB"}
    ways = ("AtoB", "BtoA")
    pairs |= {f"{name}_{way}" for name in ("psnr", "ssim", "feature_distance") for way in ways}
    assert set(summary["quality"]) == pairs | {f"{name}_{way}" for name in SETS for way in ways}
    last = lines(folder)[-2:]
    assert {"step", "loss/G_A", "loss/D_B", "loss/cycle_A", "lr/G"} <= set(last[0])
    assert {"balance/D_A_real_right", "balance/gradient_G"} <= set(last[0])
    assert {"health/norms", "probe/polarity_AtoB", "probe/diversity_BtoA"} <= set(last[1])
    logged = {k: v for k, v in last[1].items() if k.startswith("quality/")}
    assert {k.removeprefix("quality/"): v for k, v in logged.items()} == summary["quality"]
    assert last[1]["protocol"] == summary["protocol"] and summary["best"]["step"] == 2
    assert 0 < summary["evaluation_seconds"] and "evaluation=" in done.stderr
    said = done.stdout.splitlines()
    assert "norm instance" in said[0] and "digits_m" in said[0] and "CPU" in said[0]
    assert any(line.startswith("accuracy_AtoB: ") for line in said)
    assert said[-2:] == [f"samples: {folder / 'samples'}", f"tensorboard --logdir {folder}"]
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr

    # The same command again does not overwrite the run, and another one that is refused neither.
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = refused(*CYCLEGAN)
    assert str(folder) in again and "resume=auto" in again
    assert "model.width" in refused(*CYCLEGAN, "resume=auto", "model.width=3")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resblock_gan(tmp_path: Path):
    folder = tmp_path / "run"
    done = forked(*RESBLOCK, f"hydra.run.dir={folder}", said=tmp_path / "said")
    assert done.returncode == 0, done.stderr
    summary = check_run(folder, 2)
    classes = {f"class_{name}/{k}" for name in ("fid", "accuracy") for k in range(10)}
    assert set(summary["quality"]) == {*SETS, "class_fid", *classes}
    assert summary["reference"]["accuracy_real"] > 0.5  # the classifier reads real digits
    assert "norm conditional_batch" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1] == f"tensorboard --logdir {folder}"


def test_multirun_and_the_kernels_losses(tmp_path: Path):
    """Two norms on two backends, in one command: four runs, the same losses on both backends."""
    for name in ("trainA", "trainB", "testA", "testB"):
        (tmp_path / name).mkdir()
        for i in range(2 if name.startswith("train") else 1):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    sizes = [
        "data=folder_pair", f"data.root={tmp_path}", "data.image_size=8", "data.load_size=10",
        "data.num_workers=0", "data.batch_size=1", "model.width=1", "model.d_width=1",
        "model.blocks=1", "model.downsamplings=0", "model.d_layers=1", "trainer.steps=3",
        "trainer.log_every=1", "model.identity_weight=0.0",
    ]  # fmt: skip
    done = forked(
        "-m", *sizes, "norm=instance,batch", "norm.backend=torch,triton",
        f"hydra.sweep.dir={tmp_path / 'out'}", said=tmp_path / "said", interpret=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for norm in ("instance", "batch"):
        folders = sorted((tmp_path / "out" / f"cyclegan-{norm}-folder_pair").iterdir())
        assert len(folders) == 2
        for folder, backend in zip(folders, ("torch", "triton"), strict=True):
            check_run(folder, 3)
            assert f"backend: {backend}\n" in (folder / ".hydra" / "config.yaml").read_text()
        torch_, triton_ = (lines(folder) for folder in folders)
        assert [line["step"] for line in torch_] == [0, 1, 2, 3, 3]
        for a, b in zip(torch_, triton_, strict=True):
            keys = [k for k in a if k.startswith(("loss/", "quality/", "health/"))]
            assert a.keys() == b.keys() and (keys or a["step"] == 0)
            assert [a[k] for k in keys] == pytest.approx([b[k] for k in keys], abs=1e-4)


# ---- requests that cannot be fulfilled


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    def one_line(*arguments: str) -> str:
        folders = [f"hydra.run.dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'run'}"]
        done = forked(*arguments, *folders, said=tmp_path / "said")
        assert done.returncode == 2, done.stderr
        assert done.stdout == "" or "-m" in arguments and "Traceback" not in done.stdout
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    return one_line


NO_CONDITIONAL = "choose norm= instance, batch, group, layer, none"
CASES = {
    "norm=instnce": ["norm=instnce", "did you mean instance?", "conditional_batch"],
    "model=cyclgan": ["model=cyclgan", "did you mean cyclegan?", "resblock_gan"],
    "experiment=sngan": ["experiment=sngan", "did you mean sngan_cifar10?"],
    "nrom=batch": ["nrom", "did you mean norm?"],
    "norm.bakend=torch": ["norm.bakend", "did you mean norm.backend?"],
    "+norm.bakend=torch": ["norm.bakend", "did you mean norm.backend?"],
    "trainer.stepz=3": ["trainer.stepz", "did you mean trainer.steps?"],
    "model.z_dim=3": ["model.z_dim"],
    "trainer.steps=many": ["trainer.steps", "many"],
    "trainer.steps=0": ["trainer.steps=0", "must be greater than 0"],
    "norm=conditional_batch": ["norm=conditional_batch", "cyclegan", NO_CONDITIONAL],
    "norm=conditional_instance": ["norm=conditional_instance", "cyclegan", NO_CONDITIONAL],
    "data=digits": ["data=digits", "cyclegan", "choose data= digits_m, folder_pair"],
    "model=resblock_gan data=digits_m": ["data=digits_m", "resblock_gan", "choose data= digits,"],
    "data=folder_pair": ["data.root", "missing"],
    "data=folder_pair data.root=/nonexistent": ["data.root=/nonexistent"],
    "model=resblock_gan data=cifar10 data.download=false data.root=/nonexistent": [
        "data=cifar10", "/nonexistent", "data.root=", "data=digits",
    ],
    "norm.backend=triton": ["backend", "no GPU", "'auto' or 'torch'", "TRITON_INTERPRET=1"],
    "trainer.device=cuda": ["trainer.device=cuda", "no GPU", "trainer.device=cpu"],
    "norm=batch data.batch_size=1 data.image_size=4": [
        "norm=batch", "data.image_size=4", "data.batch_size=1", "larger batch or image",
    ],
    "norm=instance data.image_size=8": ["norm=instance", "data.image_size=8", "larger image"],
    "norm=null": ["string"],
    "trainer=5": ["string"],
    "trainer.steps": ["trainer.steps"],
    "trainer.steps=[": ["'['"],
    "resume=/nonexistent": ["/nonexistent"],
    "optim.beta1=1": ["optim.beta1"],
    "loss=rpgna": ["loss=rpgna", "did you mean rpgan?", "wgan_gp"],
    "loss=wgan_gp norm=batch": ["norm=batch", "gradient_penalty", "choose norm= instance"],
    "-m norm=instance,instnce": ["norm=instnce", "did you mean instance?"],
    "-m norm=conditional_batch,conditional_instance": [NO_CONDITIONAL],
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arguments", CASES)
def test_a_wrong_request_gets_one_line(arguments: str, refused, tmp_path: Path):
    line = refused(*arguments.split())
    for part in CASES[arguments]:
        assert part in line
    left = [p.name for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert left == ["multirun.yaml"] if "-m" in arguments else not (tmp_path / "run").exists()


def test_the_way_out_of_one_value_per_channel_is_one_of_trains(refused):
    """`degenerate=` is an argument of the library's; no configuration key leads to it."""
    assert "degenerate" not in refused("norm=batch", "data.batch_size=1", "data.image_size=4")


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(tmp_path: Path):
    done = run("norm=instnce", f"hydra.run.dir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "did you mean instance?" in done.stderr
    assert not (tmp_path / "run").exists()
