"""How compiled kernels are called again: on a driver that launches nothing, in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

STUBBED = """
import torch
from benchmarks import host
from gannorm.norms import functional as G
from gannorm import use_backend
from triton import knobs

calls, described = [], []
host.stub(lambda *arguments: calls.append(arguments))

def norm(x):
    del calls[:]
    with use_backend("triton"):
        y = G.instance_norm(x)
    ((*_, metadata, enter, leave, at_x, at_y), ) = [call[:11] for call in calls]
    assert at_x == x.data_ptr() and at_y == y.data_ptr()  # addresses, not tensors
    return metadata is not None, enter is not None, leave is not None

memory = torch.randn(2 * 3 * 16 + 1)
aligned, shifted = memory[:-1].view(2, 3, 4, 4), memory[1:].view(2, 3, 4, 4)
with use_backend("triton"):
    for x in (aligned, shifted):
        G.instance_norm(x)  # compiled
for x in (aligned, shifted, aligned):
    assert norm(x) == (False, False, False)
(call,) = G._calls.values()
kernel = call.launches.apply
assert sorted(kernel.compiled) == [(), (False, *[True] * 8)]
knobs.runtime.launch_enter_hook.add(lambda launch: described.append(launch.get()["name"]))
assert norm(aligned) == (True, True, True)
print("as it should be")
"""


def test_addresses_alignment_and_a_profilers_hooks():
    """Later calls hand over addresses; a tensor off 16 bytes has a kernel of its own; a profiler
    gets the description of a launch that is otherwise not made."""
    command = [sys.executable, "-c", STUBBED]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "as it should be\n", done.stderr
