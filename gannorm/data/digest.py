"""What data is, in a short word: the key under which results about it are kept."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor


def digest(*parts: object) -> str:
    """32 hexadecimal digits of the content: a tensor's values, a file's bytes, else the `repr`."""
    total = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256(type(part).__name__.encode())
        if isinstance(part, Tensor):
            one.update(f"{part.dtype} {tuple(part.shape)}".encode())
            one.update(
                part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(part, Path):
            one.update(part.read_bytes())
        else:
            one.update(repr(part).encode())
        total.update(one.digest())
    return total.hexdigest()[:32]
