"""A real signal in every phase of a real run: its exit code, one whole checkpoint, nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import hasten
from test_loop import config, equal, lines, losses, weights
from test_train import FORKS

from gannorm.errors import RequestError
from gannorm.schema import STOP_SIGNALS
from gannorm.tasks.class_conditional import ClassConditional
from gannorm.tasks.class_conditional_evaluator import ClassConditionalEvaluator
from gannorm.training import checkpoint, loop, run
from gannorm.training.dashboard import Dashboard
from gannorm.training.loop import train
from gannorm.training.monitor import Monitor

pytestmark = pytest.mark.usefixtures("quick_runs")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
# By phase: where it is held up, and at which call of it.
PHASES = {
    "data": (loop, "build_data", 1),
    "reference": (ClassConditionalEvaluator, "reference_figures", 1),
    "first samples": (Monitor, "images", 1),
    "first batch": (loop.torch.utils.data._utils.fetch._MapDatasetFetcher, "fetch", 1),
    "batch": (loop.torch.utils.data._utils.fetch._MapDatasetFetcher, "fetch", 3),
    "step": (ClassConditional, "train_step", 3),
    "evaluation": (ClassConditionalEvaluator, "measure", 2),
    "diagnosis": (ClassConditionalEvaluator, "diagnose", 1),
    "samples": (Monitor, "images", 2),
    "save": (checkpoint, "save", 2),
    "last evaluation": (ClassConditionalEvaluator, "measure", 3),
    "end": (Dashboard, "compare", 1),
}
BEFORE = ("data", "reference")
HELD = 0.3  # seconds
STEPS = ["trainer.steps=6", "trainer.log_every=2", "trainer.eval_every=3",
         "trainer.sample_every=3", "trainer.checkpoint_every=4"]  # fmt: skip


def held(phase: str, folder: Path) -> None:
    """In a process of its own: the run that takes its time in `phase`, and says so by a file."""
    hasten(pytest.MonkeyPatch())
    place, name, call = PHASES[phase]
    whole, calls = getattr(place, name), []

    def slow(*args, **options):
        calls.append(1)
        if len(calls) == call:
            (folder / "here").touch()
            until = time.monotonic() + HELD
            while time.monotonic() < until:
                time.sleep(0.01)
        return whole(*args, **options)

    setattr(place, name, slow)
    os.chdir(folder)
    train(config("resblock_gan", *STEPS), folder / "run")


def ended_in(phase: str, number: int, folder: Path, delay: float = 0.1) -> int:
    """The exit code of the run that is sent a signal there; it ends within ten seconds."""
    process = FORKS.Process(target=held, args=(phase, folder))  # no fork of autograd's threads
    process.start()
    try:
        while process.is_alive() and not (folder / "here").exists():
            time.sleep(0.005)
        time.sleep(delay)
        began = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(20)
        assert time.monotonic() - began < 10
    finally:
        process.kill()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(quick_runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(config("resblock_gan", *STEPS), folder)
    return folder


def quality(run_dir: Path) -> list[dict]:
    """What evaluations have logged, less the time they took and what is told at a start too."""
    found = [line for line in lines(run_dir) if "quality/fid" in line]
    out = ("speed/evaluation_share", "reference/")
    return [{k: v for k, v in line.items() if not k.startswith(out)} for line in found]


def went_on_as(undisturbed: Path, run_dir: Path) -> None:
    """Continued, the run is the undisturbed one: weights, figures, the best, nothing twice."""
    train(config("resblock_gan", *STEPS, "resume=auto"), run_dir)
    equal(weights(undisturbed), weights(run_dir))
    assert losses(undisturbed) == losses(run_dir)
    assert quality(undisturbed) == quality(run_dir)
    assert [q["step"] for q in quality(run_dir)] == [3, 6]
    both = [checkpoint.load(each / run.BEST) for each in (undisturbed, run_dir)]
    equal(both[0]["task"], both[1]["task"])
    assert both[0]["best"] == both[1]["best"]
    pictures = [sorted(p.name for p in (d / "samples").iterdir()) for d in (undisturbed, run_dir)]
    assert pictures[0] == pictures[1]


def in_phase(
    phase: str, number: int, undisturbed: Path, folder: Path, delay: float = 0.1,
    goes_on: bool = True,
) -> None:  # fmt: skip
    assert ended_in(phase, number, folder, delay) == 128 + number
    run_dir = folder / "run"
    saved = sorted((run_dir / "checkpoints").glob("step_*")) if run_dir.exists() else []
    if phase in BEFORE:
        assert not saved
        return
    assert checkpoint.load(saved[-1])["step"] == int(saved[-1].stem.removeprefix("step_"))
    assert not list(run_dir.rglob("*.partial"))
    assert (run_dir / "summary.json").exists() == (phase == "end")
    if goes_on:
        went_on_as(undisturbed, run_dir)


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(phase, undisturbed, tmp_path):
    """Continued to its end where something might be lost."""
    number = SIGNALS[list(PHASES).index(phase) % len(SIGNALS)]
    goes_on = phase in ("first batch", "step", "evaluation", "save")
    in_phase(phase, number, undisturbed, tmp_path, goes_on=goes_on)


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_twenty_signals_in_each_phase(phase, undisturbed, tmp_path):
    """At random moments; every fourth run is continued to its end."""
    pick = random.Random(phase)
    for k in range(20):
        folder = tmp_path / str(k)
        folder.mkdir()
        delay = pick.random() * (HELD - 0.05)
        in_phase(phase, SIGNALS[k % 3], undisturbed, folder, delay, goes_on=k % 4 == 0)


def test_a_second_signal_ends_at_once(tmp_path):
    """While the first one waits for its step's end, which takes another minute."""
    code = (
        "import signal, time\n"
        "from gannorm.training.stopping import Stop\n"
        "with Stop(['SIGTERM', 'SIGINT']) as stop:\n"
        "    print('ready', flush=True)\n"
        "    try:\n"
        "        end = time.monotonic() + 60\n"
        "        while time.monotonic() < end: time.sleep(0.01)\n"
        "    finally: time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for wait in (0.2, 1.1):  # one within a second is the first
        process.send_signal(signal.SIGTERM)
        time.sleep(wait)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT


def test_signals_are_named(tmp_path):
    for name in ("SIGKILL", "TERM", "SIGCHLD"):
        with pytest.raises(RequestError) as error:
            train(config("resblock_gan", f"trainer.stop_signals=[SIGINT,{name}]"), tmp_path / "no")
        assert f"names '{name}'; choose from" in str(error.value)
        assert all(each in str(error.value) for each in STOP_SIGNALS)
    assert not (tmp_path / "no").exists() and "SIGXCPU" in STOP_SIGNALS
