"""The CUDA kernel of WKV-7: compiled by NVRTC and launched through NVIDIA's cuda-core, so no CUDA toolkit is needed.

Nothing waits for the device: what is known only there, the documents' bounds, is used only there.

Shapes: T tokens of all documents, H heads, N = 64, D documents, K = T // 16 + D saved states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from streaming_rwkv.ops import nvrtc

SAVED_EVERY = 16  # tokens
THREADS = 128  # of a block
SOURCE = "wkv7/wkv7.cu"

# Runs the named kernel for inputs of a dtype, on so many blocks, with integers and pointers for arguments.
Launch = Callable[[str, torch.dtype, int, list[int]], None]


def forward(
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    save: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous (1, T, H, N) inputs → y, final_state (D, H, N, N), and for `backward` removed (T, H, N) and states
    (K, H, N, N); the last two are empty unless `save`."""
    r = inputs[0]
    _, tokens, heads, size = r.shape
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty_like(r)
    final_state = r.new_empty(documents, heads, size, size, dtype=torch.float32)
    removed = r.new_empty((tokens, heads, size) if save else 0, dtype=torch.float32)
    states = r.new_empty((tokens // SAVED_EVERY + documents, heads, size, size) if save else 0, dtype=torch.float32)
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
    # Longest first: the last blocks to start are then the shortest.
    order = torch.argsort(cu_seqlens.diff(), descending=True, stable=True).to(torch.int32)
    cu_seqlens, order = (x.to(r.device, non_blocking=True) for x in (cu_seqlens, order))
    _, tokens, heads, _ = r.shape
    documents = cu_seqlens.shape[0] - 1
    # The kernel reads 16 bytes at a time; a view into another tensor may begin anywhere.
    aligned = [x.clone() if x is not None and x.data_ptr() % 16 else x for x in tensors]
    pointers = [0 if x is None else x.data_ptr() for x in (cu_seqlens, order, *aligned)]
    blocks = heads * (documents + 1)  # the last of each head clears the padding
    if launch is None:
        launch = functools.partial(_launch_on_device, r.device)
    launch(name, r.dtype, blocks, [tokens, heads, documents, *pointers])


def _launch_on_device(device: torch.device, name: str, dtype: torch.dtype, blocks: int, arguments: list[int]) -> None:
    nvrtc.launch(SOURCE, _macros(dtype), name, device, blocks=blocks, threads=THREADS, arguments=arguments)


def _macros(dtype: torch.dtype) -> nvrtc.Macros:
    return (("WKV7_BFLOAT16", "1"),) if dtype == torch.bfloat16 else ()


def compile_cubin(source: Path, dtype: torch.dtype, architecture: str) -> tuple[bytes, str]:
    """`nvrtc.compile_cubin` for inputs of `dtype`."""
    return nvrtc.compile_cubin(source, _macros(dtype), architecture)
