"""SIGKILL at any moment: resume=auto goes on as if nothing had happened, to the last bit."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from exact_training import ROOT, on_few_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import MODELS, equal, losses, weights
from test_train import FORKS, lines

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux's /proc")

OFTEN = [
    "trainer.precision=bf16", "data.num_workers=1", "trainer.log_every=1", "trainer.eval_every=70",
    "trainer.sample_every=15", "trainer.checkpoint_every=2", "metrics.samples=16", "resume=auto",
]  # fmt: skip
LIFE = 6.0  # seconds within which the other kills come
ORPHANED = 10.0  # seconds that a worker may outlive its run


def trains(arguments: list[str], said: str) -> None:
    """The body of a process: train.py on few digits."""
    os.chdir(ROOT)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of its workers, as where a user starts it
    on_few_digits()
    from gannorm.commands.train import main

    sys.argv = ["train.py", *arguments]
    main()


def start(model: str, steps: int, folder: Path):
    own = [*MODELS[model], *OFTEN, f"trainer.steps={steps}", f"hydra.run.dir={folder}"]
    process = FORKS.Process(target=trains, args=(own, str(folder) + ".txt"))
    process.start()
    return process


def saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.stem for path in (folder / "checkpoints").glob("step_*.pt")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def halves(folder: Path) -> list[Path]:
    """What is being written, or was."""
    return list((folder / "checkpoints").glob("*.partial"))


def workers(process: int) -> set[int]:
    """The processes that a run has started; none where it has ended."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return {int(word) for task in tasks for word in (task / "children").read_text().split()}
    except FileNotFoundError:
        return set()


def kill(process, folder: Path, inside: bool, follow: int, chance: random.Random) -> set[int]:
    """SIGKILL inside a save, once `follow` steps follow on the last resume, or at any moment: the
    workers that it had."""
    began, first, until = time.monotonic(), saved(folder), chance.uniform(0.2, LIFE)
    for name in halves(folder):
        name.unlink()  # of the kill before: what is there from now on is this process's
    while process.is_alive():
        far = saved(folder) - first
        if inside and far >= follow and halves(folder):
            break
        if not inside and (time.monotonic() - began > until or far > 2 * follow):
            break
        time.sleep(0 if inside and far >= follow else 0.01)
    own = workers(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, Path(str(folder) + ".txt").read_text()
    return own


def alive(processes: set[int]) -> set[int]:
    return {each for each in processes if Path(f"/proc/{each}").exists()}


def whole_lines(folder: Path) -> dict[int, dict[str, float]]:
    """The losses by step, of a file whose last line may be half."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    text = path.read_text()
    (path.parent / "seen").mkdir(exist_ok=True)
    (path.parent / "seen" / "metrics.jsonl").write_text(text[: text.rfind("\n") + 1])
    return losses(path.parent / "seen")


def check_rising(folder: Path, steps: int) -> None:
    """Of each figure: steps rise, and none of the losses' is missing; in TensorBoard too."""
    seen: dict[str, list[int]] = {}
    for line in lines(folder):
        for key in line.keys() - {"step", "protocol"}:
            seen.setdefault(key, []).append(line["step"])
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for found in (seen, shown):
        assert not {key: at for key, at in found.items() if at != sorted(set(at))}
        assert found["lr/G"] == list(range(1, steps + 1))


def check(model: str, kills: int, follow: int, folder: Path) -> None:
    """follow: losses that follow on a resume, at least where it is killed inside a save."""
    chance, steps = random.Random(model), 2 * follow * (kills + 1)
    whole, part = folder / "whole", folder / "part"
    undisturbed = start(model, steps, whole)
    orphans: list[tuple[float, set[int]]] = []
    inside = 0
    for number in range(kills):
        first = saved(part)
        own = kill(start(model, steps, part), part, number % 2 == 0, follow, chance)
        orphans.append((time.monotonic(), own))
        inside += bool(halves(part))
        if number == 0:
            undisturbed.join()
            assert undisturbed.exitcode == 0, Path(str(whole) + ".txt").read_text()
            expected = losses(whole)
        found = whole_lines(part)
        assert {step: expected[step] for step in found} == found
        assert number % 2 == 1 or max(found) - first >= follow
        for when, processes in orphans:
            late = time.monotonic() - when > ORPHANED
            assert not (late and alive(processes))
    assert inside >= kills // 2  # a save may have ended in between; others are hit by chance
    last = start(model, steps, part)
    last.join()
    assert last.exitcode == 0, Path(str(part) + ".txt").read_text()
    equal(weights(whole), weights(part))
    assert losses(part) == expected and not halves(part)
    check_rising(part, steps)
    every = {each for _, processes in orphans for each in processes}
    while alive(every) and time.monotonic() - orphans[-1][0] < ORPHANED:
        time.sleep(0.05)
    assert not alive(every)


def test_two_kills(tmp_path):
    check("cyclegan", 2, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_fifty_kills(model, tmp_path):
    check(model, 25, 20, tmp_path)
