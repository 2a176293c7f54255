"""Training with several processes, as torchrun starts them: what one process would do."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close as close

from gannorm.training import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
EXACT = Path(__file__).parent / "exact_training.py"
CYCLEGAN = [
    "data.image_size=8", "data.batch_size=4", "model.width=4", "model.blocks=1", "model.d_width=4",
    "model.downsamplings=1", "model.d_layers=1", "model.pool_size=3", "norm=batch",
    "model.dropout=true", "optim.d_steps=2", "loss.diffaugment=[color,cutout]",
]  # fmt: skip
RESBLOCK = [
    "model=resblock_gan", "data.image_size=8", "data.batch_size=8", "model.g_widths=[8,8]",
    "model.d_widths=[8]", "model.d_downsamplings=1", "model.z_dim=4", "loss=rpgan",
    "loss.gradient_penalty=1", "loss.diffaugment=[color,translation,cutout]", "data.num_workers=1",
]  # fmt: skip
STEPS = [
    "trainer.steps=6", "trainer.log_every=1", "trainer.eval_every=3", "trainer.sample_every=6",
    "trainer.checkpoint_every=3", "metrics.standing_batches=2",
]  # fmt: skip
PARTS = ["trainer.grad_accum=2", "trainer.checkpointing=true"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(processes: int, *command: object, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", f"--max-restarts={restarts}", *map(str, command),
    ]  # fmt: skip


def run(command: list[str], expect: int = 0, **options) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, **options
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    kinds = ("loss/", "balance/", "lr/")
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith(kinds)}
        for line in lines(run_dir)
        if "lr/G" in line
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """In `one` and `two` the runs of as many processes, with the same batch of all."""
    root = tmp_path_factory.mktemp("processes")
    for name, prefix in (("one", [sys.executable, str(EXACT)]), ("two", torchrun(2, EXACT))):
        runs = [
            [root / name / "cyclegan", *CYCLEGAN, *STEPS, *PARTS, "data.global_batch_size=4"],
            ["--", root / name / "resblock_gan", *RESBLOCK, *STEPS, "data.global_batch_size=8"],
        ]
        (root / f"{name}.txt").write_text(run([*prefix, *(str(w) for each in runs for w in each)]))
    return root


@pytest.mark.parametrize("model", ["cyclegan", "resblock_gan"])
def test_two_processes_train_what_one_does(folder, model):
    """Losses, weights, averages, statistics, optimizers, pools and generators."""
    one, two = (folder / name / model for name in ("one", "two"))
    expected, found = losses(one), losses(two)
    assert expected.keys() == found.keys() == set(range(1, 7))
    for step, figures in expected.items():
        assert figures.keys() == found[step].keys()
        for key, value in figures.items():
            assert math.isclose(found[step][key], value, rel_tol=1e-8, abs_tol=1e-9), (step, key)
    states = [checkpoint.load(checkpoint.newest(each)) for each in (one, two)]
    assert_close(states[0]["task"], states[1]["task"])
    for key in ("torch", "python"):
        assert str(states[0]["rng"][key]) == str(states[1]["rng"][key])


def assert_close(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        close(b, a, rtol=1e-7, atol=1e-9, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict | list | tuple):
        assert len(a) == len(b), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_close(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


@pytest.mark.parametrize("model", ["cyclegan", "resblock_gan"])
def test_their_evaluation_is_that_of_one(folder, model):
    one, two = (
        json.loads((folder / name / model / "summary.json").read_text()) for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    for group in ("quality", "quality_raw", "reference"):
        assert one[group].keys() == two[group].keys() != set()
        for name, value in one[group].items():
            assert math.isclose(two[group][name], value, rel_tol=1e-5, abs_tol=1e-6), name
    assert one["best"]["step"] == two["best"]["step"]


def test_one_of_them_writes(folder):
    """The same files as one process, and every line once."""
    for model in ("cyclegan", "resblock_gan"):
        files = {
            name: sorted(
                re.sub(r"tfevents.*", "tfevents", str(path.relative_to(folder / name)))
                for path in (folder / name / model).rglob("*")
                if path.name != ".launch"
            )
            for name in ("one", "two")
        }
        assert files["one"] == files["two"]
        assert [line["step"] for line in lines(folder / "one" / model)] == [
            line["step"] for line in lines(folder / "two" / model)
        ]
    said = (folder / "two.txt").read_text()
    assert said.count("parameters: G_A") == 1 and said.count("6 steps in") == 2
    assert "2 processes, 2 of a batch's 4 images each" in said


# ---- a process dies, a signal comes, a number is no number: with the real command

TRAIN = ROOT / "train.py"
SMALL = [*CYCLEGAN[:-2], "trainer.log_every=2", "trainer.eval_every=1000", "metrics.samples=20",
         "trainer.sample_every=1000"]  # fmt: skip


class Job:
    """torchrun with train.py under way, in a folder of its own; workers: the training processes."""

    def __init__(
        self, folder: Path, *overrides: str, processes: int = 2, restarts: int = 0,
        script: Path = TRAIN,
    ):  # fmt: skip
        self.folder, words = folder, [str(script), *SMALL, *overrides]
        together = torchrun(processes, *words, restarts=restarts)
        self.log = (folder / "log.txt").open("w+")
        self.process = subprocess.Popen(
            together if processes > 1 else [sys.executable, *words], cwd=folder,
            env=environment(), stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run_dirs(self) -> list[Path]:
        return sorted(self.folder.glob("outputs/*/*"))

    def workers(self) -> dict[int, int]:
        """Process numbers by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                status = (path / "stat").read_text().rsplit(")", 1)[1].split()
                if int(status[1]) == self.process.pid and status[0] != "Z":
                    words = (path / "environ").read_text().split("\0")
                    variables = dict(word.split("=", 1) for word in words if "=" in word)
                    found[int(variables["RANK"])] = int(path.name)
            except (OSError, KeyError):
                continue
        return found

    def until(self, name: str) -> None:
        """Wait for a file of the run folder."""
        for _ in range(600):
            if any(self.folder.glob(f"outputs/*/*/{name}")):
                return
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)
        raise AssertionError(self.said())

    def end(self, seconds: float = 60) -> int:
        """Its exit code; within `seconds`, with no process left."""
        workers = self.workers()
        code = self.process.wait(seconds)
        assert not [pid for pid in workers.values() if Path(f"/proc/{pid}").exists()]
        return code

    def said(self) -> str:
        return (self.folder / "log.txt").read_text()


def in_order(run_dir: Path) -> None:
    """metrics.jsonl and TensorBoard, as it is shown: no step twice, none missing."""
    assert list(losses(run_dir)) == list(range(2, max(losses(run_dir)) + 1, 2))
    events = EventAccumulator(str(run_dir)).Reload()
    steps = [event.step for event in events.Scalars("loss/G_A")]
    assert steps == list(losses(run_dir))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(tmp_path, rank):
    job = Job(tmp_path, "trainer.steps=2000", "trainer.checkpoint_every=10")
    job.until("checkpoints/step_00000020.pt")
    os.kill(job.workers()[rank], signal.SIGKILL)
    assert job.end() == 1
    (run_dir,) = job.run_dirs()
    assert checkpoint.load(checkpoint.newest(run_dir))["step"] >= 20


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again(tmp_path, rank):
    """From the last checkpoint, in the same folder; once before there is one: from the start."""
    job = Job(tmp_path, "trainer.steps=120", "trainer.checkpoint_every=20", restarts=2)
    job.until("metrics.jsonl")
    os.kill(job.workers()[rank], signal.SIGKILL)
    job.until("checkpoints/step_00000040.pt")
    os.kill(job.workers()[rank], signal.SIGKILL)
    assert job.end(120) == 0, job.said()
    (run_dir,) = job.run_dirs()
    assert re.search(r"continued from .*/step_0000(0040|0060).pt", job.said())
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 120
    in_order(run_dir)


def test_two_machines_start_again_together(tmp_path):
    """As docs/scaling.md says for several; here two calls of torchrun, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir = tmp_path / "run"
    machine = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--max-restarts=2", str(TRAIN),
        *SMALL, "trainer.steps=120", "trainer.checkpoint_every=20", "resume=auto",
        f"hydra.run.dir={run_dir}",
    ]  # fmt: skip
    own = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "log.txt").open("w") as log:
        both = [
            subprocess.Popen(machine, cwd=tmp_path, env=own, stdout=log, stderr=subprocess.STDOUT)
            for _ in range(2)
        ]
        while not (run_dir / "checkpoints" / "step_00000040.pt").exists():
            assert all(each.poll() is None for each in both), (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        (trainer,) = Path(f"/proc/{both[1].pid}/task/{both[1].pid}/children").read_text().split()
        os.kill(int(trainer), signal.SIGKILL)
        assert [each.wait(120) for each in both] == [0, 0], (tmp_path / "log.txt").read_text()
    assert (tmp_path / "log.txt").read_text().count("continued from") == 1
    in_order(run_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_all_with_one_checkpoint(tmp_path, processes, number):
    job = Job(tmp_path, "trainer.steps=2000", "trainer.checkpoint_every=2000", processes=processes)
    job.until("metrics.jsonl")
    while not losses(job.run_dirs()[0]):
        time.sleep(0.1)
    job.process.send_signal(number)
    assert job.end(30) == (1 if processes > 1 else 128 + number)  # of torchrun itself
    (run_dir,) = job.run_dirs()
    (path,) = (run_dir / "checkpoints").glob("*.pt")
    step = checkpoint.load(path)["step"]
    said = job.said()
    assert said.count(f"ended by {number.name} behind step {step}; go on with resume=") == 1
    again = [f"resume={run_dir}", f"trainer.steps={step + 4 + step % 2}"]
    run(torchrun(2, TRAIN, *SMALL, *again), cwd=tmp_path)
    in_order(run_dir)


def test_a_signal_to_every_process_of_the_job_is_one_signal(tmp_path):
    """As Slurm sends it: torchrun, both training processes and their loaders' have it at once."""
    job = Job(tmp_path, "trainer.steps=2000", "trainer.checkpoint_every=2000", "data.num_workers=1")
    job.until("metrics.jsonl")
    while not losses(job.run_dirs()[0]):
        time.sleep(0.1)
    for pid in [job.process.pid, *family(job.process.pid)]:
        os.kill(pid, signal.SIGTERM)
    assert job.end(30) == 1
    (path,) = (job.run_dirs()[0] / "checkpoints").glob("*.pt")
    step = checkpoint.load(path)["step"]
    assert job.said().count(f"ended by SIGTERM behind step {step}; go on with resume=") == 1


def family(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *family(child)]
    return found


def poisoned(folder: Path, last: int) -> Path:
    """A train.py whose second process reads NaN from its 13th images on, to the `last`."""
    script = folder / "poisoned.py"
    script.write_text(
        "import os, math\n"
        "from importlib import import_module\n"
        "from gannorm.commands.train import main\n"
        "batches = import_module('gannorm.data.batches')\n"
        "finite, calls = batches.finite, []\n"
        "def poisoned(*args):\n"
        "    batch = finite(*args)\n"
        "    calls.append(args)\n"
        f"    if 12 < len(calls) <= {last} and os.environ['RANK'] == '1':\n"
        "        batch['image'].fill_(math.nan)\n"
        "    return batch\n"
        "batches.finite = poisoned\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    return script


@pytest.mark.parametrize("way", ["skip", "rewind"])
def test_a_number_that_is_none_in_one_process_for_once(tmp_path, way):
    """All skip that step, or go back together."""
    often = ["trainer.steps=20", "trainer.checkpoint_every=4", f"trainer.on_nonfinite={way}"]
    job = Job(tmp_path, *often, script=poisoned(tmp_path, 14))
    assert job.end(120) == 0, job.said()
    (run_dir,) = job.run_dirs()
    summary = json.loads((run_dir / "summary.json").read_text())
    found = (summary["steps"], summary["skipped_steps"], summary["rewinds"])
    assert found == ((20, 1, 0) if way == "skip" else (20, 0, 1))
    in_order(run_dir)


def test_a_number_that_is_none_in_one_process_stops_all_with_one_message(tmp_path):
    job = Job(tmp_path, "trainer.steps=2000", script=poisoned(tmp_path, 10**9))
    assert job.end(120) == 1
    said = job.said()
    assert len(re.findall(r"FloatingPointError: .* became nan before step 8, first in", said)) == 1
    assert "first in the output of G_A model.0 (Identity), in process 1" in said
    assert said.count("Traceback (most recent call last):\n  File") <= 3
    last = lines(job.run_dirs()[0])[-1]
    assert last["health/not_finite"] == 1.0


def test_a_checkpoint_continues_with_any_number_of_processes(tmp_path):
    """2, then 1, then 4 processes: what one process trains in one go."""
    steps = [*STEPS[1:], "optim.schedule=constant", "data.batch_size=4"]
    cyclegan = [word for word in CYCLEGAN if "batch_size" not in word]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = ["trainer.steps=4", *cyclegan, *steps]
    run([sys.executable, str(EXACT), str(whole), *first, "trainer.steps=12"])
    run(torchrun(2, EXACT, parts, *first, "data.global_batch_size=4"))
    more = [*first, "resume=auto"]
    run([sys.executable, str(EXACT), str(parts), *more, "trainer.steps=8"])
    said = run(torchrun(4, EXACT, parts, *more, "trainer.steps=12"))
    assert "4 processes, 1 of a batch's 4 images each" in said
    states = [checkpoint.load(checkpoint.newest(each)) for each in (whole, parts)]
    assert states[0]["step"] == 12
    assert_close(states[0]["task"], states[1]["task"])


def test_what_cannot_be_shared_is_refused_once(tmp_path):
    said = run(torchrun(2, TRAIN, *SMALL, "data.global_batch_size=7"), expect=1, cwd=tmp_path)
    assert said.count("error: data.global_batch_size=7 cannot be shared by 2 processes") == 1
    said = run(torchrun(2, TRAIN, "--multirun", *SMALL, "seed=0,1"), expect=1, cwd=tmp_path)
    assert said.count("error: --multirun") == 1
