"""The sequential CUDA kernel of WKV-7, and the launch of CUDA kernels.

NVRTC compiles them and NVIDIA's cuda-core launches them, so no CUDA toolkit is needed.

Nothing waits for the device: what is known only there, the documents' bounds, is used only there.

Shapes: T tokens of all documents, H heads, N = 64, D documents, K = T // 16 + D saved states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from streaming_rwkv.ops import nvrtc

SAVED_EVERY = 16  # tokens
THREADS = 128  # of a block


class Kernel(NamedTuple):
    """A `__global__` function and the blocks it is written for."""

    source: str  # below kernels/
    name: str
    dtype: torch.dtype  # of the inputs
    threads: int  # of a block
    shared_bytes: int = 0  # dynamic shared memory of a block


# Runs a kernel on a number of blocks, with integers and pointers for arguments.
Launch = Callable[[Kernel, int, list[int]], None]


def empty_saved(r: Tensor, documents: int, *, save: bool) -> tuple[Tensor, Tensor]:
    """Room for removed (T, H, N) and states (K, H, N, N), float32; or for nothing."""
    _, tokens, heads, size = r.shape
    slots = tokens // SAVED_EVERY + documents
    return (
        r.new_empty((tokens, heads, size) if save else 0, dtype=torch.float32),
        r.new_empty((slots, heads, size, size) if save else 0, dtype=torch.float32),
    )


def forward(
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    save: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass.

    Contiguous (1, T, H, N) inputs → y, final_state (D, H, N, N), and for `backward` removed (T, H, N) and states
    (K, H, N, N); the last two are empty unless `save`.
    """
    r = inputs[0]
    heads, size = r.shape[2:]
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = r.new_empty(documents, heads, size, size, dtype=torch.float32)
    removed, states = empty_saved(r, documents, save=save)
    kept = (removed, states) if save else (None, None)
    _run("wkv7_forward", r, cu_seqlens, [*inputs, initial_state, y, final_state, *kept], launch)
    return y, final_state, removed, states


def backward(
    inputs: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    *,
    initial_state: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs and, if `initial_state`, of the initial state (else an empty tensor).

    Args:
        saved: final_state, removed and states as `forward` returned them.
    """
    r = inputs[0]
    gradients = [torch.empty_like(x) for x in inputs]
    dinitial_state = r.new_empty(saved[0].shape if initial_state else 0, dtype=torch.float32)
    written = [*gradients, dinitial_state if initial_state else None]
    _run("wkv7_backward", r, cu_seqlens, [*inputs, *saved, dy, dfinal_state, *written], launch)
    return *gradients, dinitial_state


def _run(name: str, r: Tensor, cu_seqlens: Tensor, tensors: Sequence[Tensor | None], launch: Launch | None) -> None:
    blocks = r.shape[2] * cu_seqlens.shape[0]  # a head's documents, and one more block that clears the padding
    run_kernel(Kernel("wkv7/wkv7.cu", name, r.dtype, THREADS), r, cu_seqlens, blocks, tensors, launch)


def run_kernel(
    kernel: Kernel, r: Tensor, cu_seqlens: Tensor, blocks: int, tensors: Sequence[Tensor | None], launch: Launch | None
) -> None:
    """Run a kernel whose arguments are T, H, D, cu_seqlens, the documents by length, and `tensors`."""
    # Longest first: the last blocks to start are then the shortest.
    order = torch.argsort(cu_seqlens.diff(), descending=True, stable=True).to(torch.int32)
    cu_seqlens, order = (x.to(r.device, non_blocking=True) for x in (cu_seqlens, order))
    _, tokens, heads, _ = r.shape
    documents = cu_seqlens.shape[0] - 1
    # The kernel reads 16 bytes at a time; a view into another tensor may begin anywhere.
    aligned = [x.clone() if x is not None and x.data_ptr() % 16 else x for x in tensors]
    pointers = [0 if x is None else x.data_ptr() for x in (cu_seqlens, order, *aligned)]
    if launch is None:
        launch = functools.partial(_launch_on_device, r.device)
    launch(kernel, blocks, [tokens, heads, documents, *pointers])


def _launch_on_device(device: torch.device, kernel: Kernel, blocks: int, arguments: list[int]) -> None:
    nvrtc.launch(
        kernel.source,
        _macros(kernel.dtype),
        kernel.name,
        device,
        blocks=blocks,
        threads=kernel.threads,
        shared_bytes=kernel.shared_bytes,
        arguments=arguments,
    )


def _macros(dtype: torch.dtype) -> nvrtc.Macros:
    return (("WKV7_BFLOAT16", "1"),) if dtype == torch.bfloat16 else ()


def compile_cubin(source: Path, dtype: torch.dtype, architecture: str) -> tuple[bytes, str]:
    """Run `nvrtc.compile_cubin` for inputs of `dtype`."""
    return nvrtc.compile_cubin(source, _macros(dtype), architecture)
