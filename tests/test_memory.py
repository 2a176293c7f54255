"""Memory that is not there: real allocations that fail, told in one line, each in a process."""

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import hasten
from test_loop import ROOT, config
from test_train import FORKS

from gannorm.config import typed
from gannorm.errors import RunError, answering_requests
from gannorm.training import memory
from gannorm.training.loop import train
from gannorm.training.memory import available, limit_memory, telling_of_memory

CPU = torch.device("cpu")


def telling(words: Path, work: Callable[..., None], *args: object) -> None:
    with words.open("w") as sys.stderr, answering_requests():
        work(*args)


def in_a_process(work: Callable[..., None], *args: object, words: Path) -> tuple[int, str]:
    """The exit code of `work` in a process of its own, and what it said on stderr."""
    process = FORKS.Process(target=telling, args=(words, work, *args))
    process.start()
    process.join(120)
    process.kill()
    return process.exitcode, words.read_text()


def train_within(room: int, folder: Path, *overrides: str) -> None:
    hasten(pytest.MonkeyPatch())
    memory.available = lambda: room
    limit_memory()
    train(config("resblock_gan", *overrides), folder)


def within_the_limit(file: Path) -> None:
    limit_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) << 10
    assert abs(soft - used - memory.SHARE * available()) < 1 << 30
    assert hard == resource.RLIM_INFINITY
    torch.set_num_threads(2)
    assert (torch.ones(1 << 20) + 1).sum() == 2 << 20
    assert subprocess.run(["true"]).returncode == 0
    assert torch.from_file(str(file), size=4).sum() == 0
    with telling_of_memory(typed(config("cyclegan", "data.batch_size=7")), CPU):
        torch.empty(available() * 2, dtype=torch.uint8)


def test_a_batch_that_is_too_large_is_named(tmp_path):
    code, said = in_a_process(
        train_within,
        400 << 20,
        tmp_path / "run",
        "data.batch_size=300000",
        words=tmp_path / "words",
    )
    assert code == 1
    error = said.strip().splitlines()[-1]
    assert re.match(
        r"error: out of memory: this machine has too little for data.batch_size=300000 images of "
        r"8x8 with model=resblock_gan: \d+\.\d GiB more were not to be had; take a smaller "
        r"data.batch_size, or smaller model.g_widths, model.d_widths, .* trainer.precision=bf16$",
        error,
    )
    assert "Traceback" not in said


def test_a_limit_leaves_threads_and_commands_alone(tmp_path):
    """Within it: threads, a compiler's process, pages of a file; above it: words."""

    (tmp_path / "file").write_bytes(bytes(16))
    code, said = in_a_process(within_the_limit, tmp_path / "file", words=tmp_path / "words")
    assert code == 1 and "data.batch_size=7 images of 8x8 with model=cyclegan" in said


def test_how_it_is_said():
    cfg = typed(config("cyclegan", "data.num_workers=2", "trainer.precision=bf16"))
    gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB "
        "of which 2.00 GiB is free. Including non-PyTorch memory, this process has ..."
    )
    for error, said in (
        (gpu, "this GPU has too little .*: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 "
              "has a total capacity of 139.80 GiB of which 2.00 GiB is free; take"),
        (MemoryError(), "none is left; take .* or fewer data.num_workers$"),
        (OSError(12, "Cannot allocate memory"), "none is left"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=said) as told:
            with telling_of_memory(cfg, torch.device("cuda" if error is gpu else "cpu")):
                raise error
        assert "bf16" not in str(told.value)
    for words in (
        "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):  # fmt: skip
        with pytest.raises(RunError) as told, telling_of_memory(cfg, torch.device("cuda")):
            with telling_of_memory(cfg, torch.device("cuda"), evaluating=True):
                raise RuntimeError(words)
        assert re.search(
            r"little for an evaluation \(metrics.samples=null\) beside data.batch_size=\d+ images "
            r"of 8x8 .*: none is left; take a smaller metrics.samples, or ", str(told.value)
        )  # fmt: skip
    for other in (RuntimeError("shape"), OSError(28, "No space left on device")):
        with pytest.raises(type(other), match=str(other.args[-1])), telling_of_memory(cfg, CPU):
            raise other


def test_what_is_available():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = sum(int(x.split()[1]) << 10 for x in lines if x.startswith(("MemTotal", "SwapTotal")))
    assert 0 < available() <= total


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_control_group_leaves(version, tmp_path):
    """Pages of files are given back, whether they were read once or often; the smallest counts."""
    own = tmp_path / "cgroup"
    own.write_text("5:memory:/job/step\n1:name=systemd:/x\n" if version == 1 else "0::/job/step\n")
    root = tmp_path / "sys" / ("memory" if version == 1 else "")
    most, current = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1
        else ("memory.max", "memory.current")
    )  # fmt: skip
    groups = (("job/step", "max", 700), ("job", "1000", 800))
    for name, limit, used in groups:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(f"{limit if version == 2 or limit != 'max' else 2**63}\n")
        (folder / current).write_text(f"{used}\n")
        total = "total_inactive_file 40\ntotal_active_file 300\n" if version == 1 else ""
        own_ = "inactive_file 4\nactive_file 30\n"
        (folder / "memory.stat").write_text(
            f"anon 5\n{own_}{total}" if version == 1
            else "anon 5\ninactive_file 40\nactive_file 300\n"
        )  # fmt: skip
    assert min(memory._of_groups(own, tmp_path / "sys")) == 1000 - 800 + 340


@pytest.mark.slow
def test_the_command_is_not_killed(tmp_path):
    """What was exit code 137: 100,000 images a batch, all of the machine's memory."""
    words = ["model=resblock_gan", "data.batch_size=100000", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out of memory: this machine has too")
