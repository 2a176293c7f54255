"""One thread for each of the test processes; without a GPU the Triton kernels are interpreted.

Both are read at the first import of torch and of triton.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
