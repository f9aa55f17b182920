"""Launches of the layer's kernels: one interface to C++ on the CPU and CUDA on the GPU.

A launch names a kernel, the number of its blocks and its arguments, integers first. Both sources declare the same
arguments in the same order, so an op is written once for both devices.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streaming_rwkv.ops import nvrtc
from streaming_rwkv.ops.build import build_cpp, kernel_source
from streaming_rwkv.ops.threads import Threads, torch_threads

CPP_SOURCE, CUDA_SOURCE = "layer/layer.cpp", "layer/layer.cu"


class Kernel(NamedTuple):
    """A kernel and what it is compiled for."""

    name: str
    dtypes: tuple[torch.dtype, ...]  # the residual stream's where that matters, then that of everything else
    width: int  # channels of a row
    mixes: int | None = None


Argument = int | float | Tensor | None
Launch = Callable[[Kernel, int, Sequence[Argument]], None]


def launcher(device: torch.device) -> Launch:
    """Return the function that launches kernels on this device."""
    return launch_cpp if device.type == "cpu" else launch_cuda


def integers(arguments: Sequence[Argument]) -> list[int]:
    """Arguments as kernels take them: addresses, 0 for None, the bits of a float32."""
    found = []
    for x in arguments:
        if isinstance(x, Tensor):
            found.append(x.data_ptr())
        elif isinstance(x, float):
            found.append(int.from_bytes(struct.pack("<f", x), "little"))
        else:
            found.append(x or 0)
    return found


def symbol(kernel: Kernel) -> str:
    """Return the name of the exported C++ function of a kernel."""
    parts = [kernel.name, *([] if kernel.mixes is None else [str(kernel.mixes)])]
    return "_".join([*parts, *(str(dtype).removeprefix("torch.") for dtype in kernel.dtypes)])


class _Work(ctypes.Structure):
    """`Work` of kernels/layer/layer.cpp."""

    _fields_ = [("threads", Threads), ("blocks", ctypes.c_int64), ("width", ctypes.c_int64)]


@functools.cache
def _library() -> ctypes.CDLL:
    source = kernel_source(CPP_SOURCE)
    reads = [kernel_source(f"wkv7/{name}.h") for name in ("threads", "vectors")]
    return ctypes.CDLL(str(build_cpp(source, reads=reads)))


def launch_cpp(kernel: Kernel, blocks: int, arguments: Sequence[Argument]) -> None:
    """Run a kernel on torch's threads."""
    values = integers(arguments)
    work = _Work(torch_threads(), blocks, kernel.width)
    getattr(_library(), symbol(kernel))(ctypes.byref(work), (ctypes.c_int64 * len(values))(*values))


def launch_cuda(kernel: Kernel, blocks: int, arguments: Sequence[Argument]) -> None:
    """Run a kernel on the device and the current stream of its tensors. Nothing waits for the device."""
    if not blocks:  # no token
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    nvrtc.launch(
        CUDA_SOURCE,
        macros(kernel),
        kernel.name,
        device,
        blocks=blocks,
        threads=cuda_threads(kernel),
        arguments=integers(arguments),
    )


def macros(kernel: Kernel) -> nvrtc.Macros:
    """Return the macros that layer.cu is compiled with for this kernel."""
    found = [(kernel.name.removesuffix("_forward").removesuffix("_backward").upper(), "1")]
    if kernel.width:
        found.append(("WIDTH", str(kernel.width)))
    if kernel.mixes is not None:
        found.append(("MIXES", str(kernel.mixes)))
        if kernel.dtypes[0] == torch.bfloat16:
            found.append(("RESIDUAL_BFLOAT16", "1"))
    if torch.bfloat16 in kernel.dtypes[-1:]:
        found.append(("BFLOAT16", "1"))
    return tuple(found)


def cuda_threads(kernel: Kernel) -> int:
    """Threads of a block, as layer.cu derives them from the width; 512 for sums over tiles."""
    if not kernel.width:
        return 512
    quads = (kernel.width + 3) // 4
    turns = (quads + 511) // 512
    return (quads + 32 * turns - 1) // (32 * turns) * 32
