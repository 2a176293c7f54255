"""`trainer.deterministic=true`: the same bits from the same seed on the same machine.

On a CPU training does that anyway, for one number of threads. On a GPU torch has sums that add up
in whatever order their threads come: it is asked for others, and refuses where there are none. Our
own kernels have no atomics (docs/design.md).
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gannorm.errors import RequestError

WORKSPACE, SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # cuBLAS's deterministic ones
MEMORY: Any = torch.utils.deterministic


@contextmanager
def deterministic(asked: bool, device: torch.device) -> Iterator[None]:
    """Inside, torch's operations give the same bits each time, if that is `asked`.

    Raises:
        RequestError: cuBLAS was told otherwise, or has begun; or naming the operation that cannot.
    """
    if not asked:
        yield
        return
    if device.type == "cuda":
        _fix_workspace()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        MEMORY.fill_uninitialized_memory,
    )
    try:
        _set(True, False, False)  # memory need not be filled: none is read before
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise RequestError(
            f"trainer.deterministic=true: {found[1]} has no deterministic implementation on "
            f"{device.type}; choose parts that do without it, or trainer.deterministic=false"
        ) from error
    finally:
        _set(*before)


def _set(mode: bool, warn_only: bool, fill: bool) -> None:
    """cuDNN follows, which searches for no algorithm unless somebody asks it to."""
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    MEMORY.fill_uninitialized_memory = fill


def _fix_workspace() -> None:
    """cuBLAS reads it once, when it begins; and torch when it is first asked."""
    said = os.environ.get(WORKSPACE)
    if said is None and not torch.cuda.is_initialized():
        os.environ[WORKSPACE] = SIZES[0]
    elif said not in SIZES:
        raise RequestError(
            f"trainer.deterministic=true: {WORKSPACE} is {said or 'not set, and CUDA has begun'}; "
            f"export {WORKSPACE}={SIZES[0]} before Python starts"
        )
