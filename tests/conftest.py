"""One thread for each of the test processes; without a GPU the Triton kernels are interpreted.

Both are read at the first import of torch and of triton. Extractors that runs train are kept in a
folder of this session's, which its processes share.
"""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "GANNORM_CACHE" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="gannorm-cache-")
    os.environ["GANNORM_CACHE"] = CACHE.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def round_to_nearest_in_the_interpreter():
    """Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest, ties to even."""
    if not knobs.runtime.interpret:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            bits = torch.from_numpy(src.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(bits.view(np.uint16), tl.bfloat16)
        return truncate(self, src, dst_type)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc
    yield
    InterpreterBuilder.create_fp_trunc = truncate
