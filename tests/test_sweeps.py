"""Sweeps by Hydra's launchers, joblib's and submitit's: several runs at a time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_tables import OWN, SMALL
from test_train import CYCLEGAN, check_run, forked

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
ROOT = Path(__file__).parents[1]
JOBLIB = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
LOCAL = ["-m", "hydra/launcher=submitit_local"]


def sweep(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user starts it, on a machine without a GPU."""
    own = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OMP_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env={**own, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def process(folder: Path) -> str:
    """The number of the process that wrote a run's events."""
    (events,) = folder.glob("events.out.tfevents.*")
    return events.name.split(".")[-2]


@pytest.mark.slow
def test_two_runs_at_a_time_and_one_that_is_refused(tmp_path: Path):
    """Each in its own folder and process; the refused one ends none of the others."""
    done = sweep(
        "train.py", *JOBLIB, *CYCLEGAN, "norm=conditional_batch,instance,batch", "trainer.steps=40",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    # When it is refused, maybe behind another run's bar, and in the end.
    refusal = r"error: norm=conditional_batch cannot work with model=cyclegan[^\n]*batch,"
    said = re.findall(refusal, done.stderr)
    assert len(said) == 2 and said[0] == said[1], done.stderr
    assert "Error executing job with overrides: ['data.image_size=8'" in done.stderr
    folders = [next((tmp_path / f"cyclegan-{n}-digits_m").iterdir()) for n in ("instance", "batch")]
    for folder in folders:
        check_run(folder, 40)
    assert len({process(folder) for folder in folders}) == 2
    began = [(folder / ".hydra" / "overrides.yaml").stat().st_mtime for folder in folders]
    ended = [(folder / "summary.json").stat().st_mtime for folder in folders]
    assert max(began) < min(ended)
    assert not list((tmp_path / "cyclegan-conditional_batch-digits_m").iterdir())  # refused


@pytest.mark.slow
def test_parts_of_ones_own_and_members_of_the_study_reach_the_processes(tmp_path: Path):
    done = sweep(
        "examples/own_parts.py", *JOBLIB, "model=resblock_gan", *OWN, *SMALL, "seed=0,1",
        f"hydra.sweep.dir={tmp_path / 'own'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "own" / "resblock_gan-halves-stripes").iterdir())
    assert len(folders) == 2 and all((folder / "summary.json").exists() for folder in folders)
    study = "study=cyclegan-instance-1,cyclegan-batch-16"
    done = sweep("train.py", *JOBLIB, study, *CYCLEGAN, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("cyclegan-instance-1", "cyclegan-batch-16"):
        check_run(tmp_path / "norm_study" / name / "seed_0", 2)


@pytest.mark.slow
def test_submitit_on_this_machine(tmp_path: Path):
    """The processes and pickles that Slurm's launcher has too, without Slurm."""
    norms = "norm=instance,conditional_batch"
    done = sweep("train.py", *LOCAL, *CYCLEGAN, norms, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: norm=conditional_batch cannot work")
    check_run(next((tmp_path / "cyclegan-instance-digits_m").iterdir()), 2)


@pytest.mark.slow
def test_slurms_launcher_is_composed(tmp_path: Path):
    asked = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    asked += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=600"]
    done = forked(*asked, "--cfg", "hydra", said=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("submitit_launcher.SlurmLauncher", "partition: gpu", "gpus_per_node: 1"):
        assert line in done.stdout
