"""Choice between the kernel of an op and its definition in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

WIDTH_UNIT = 64  # of the kernels: a head
_definitions = False


@contextlib.contextmanager
def definitions() -> Iterator[None]:
    """Run the PyTorch definition of every op here instead of its kernel: what tests and benchmarks compare with."""
    global _definitions
    before, _definitions = _definitions, True
    try:
        yield
    finally:
        _definitions = before


def uses_definitions() -> bool:
    """Return True within `definitions`."""
    return _definitions


def has_kernel(width: int, *tensors: Tensor) -> bool:
    """Return True if rows of `width` channels of these types have kernels here, and `definitions` does not hold."""
    return (
        not _definitions
        and width % WIDTH_UNIT == 0
        and all(
            x.dtype in (torch.float32, torch.bfloat16) and x.device.type in ("cpu", "cuda", "meta") for x in tensors
        )
    )
