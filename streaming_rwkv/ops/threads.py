"""Threads for the C++ kernels: those of the OpenMP that torch computes with."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import torch

_forked = False


class Threads(ctypes.Structure):
    """`Threads` of kernels/wkv7/threads.h."""

    _fields_ = [("count", ctypes.c_int64), ("parallel", ctypes.c_void_p)]


def torch_threads() -> Threads:
    """Return as many threads as torch uses, and its own where that can be."""
    return Threads(torch.get_num_threads(), None if _forked else _openmp())


@functools.cache
def _openmp() -> int | None:
    """Return the address of GOMP_parallel, which every OpenMP runtime on Linux has, or None."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        with contextlib.suppress(OSError, AttributeError):  # loaded long ago; its dependencies are looked through too
            return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    return None


def _after_fork() -> None:
    global _forked
    _forked = True  # OpenMP still counts on the parent's threads, and would wait for them indefinitely


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
