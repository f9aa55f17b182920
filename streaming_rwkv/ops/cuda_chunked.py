"""The chunked CUDA kernels of WKV-7: bfloat16 inputs, tensor cores, 16 tokens at a time.

Forward, then `backward`'s two passes: one that follows each document back and saves the gradient of its state every 32
tokens, and one over all groups of 32 tokens at once. Nothing waits for the device, as in ops/cuda.py.

Shapes: T tokens of all documents, H heads, N = 64, D documents, K = T // 32 + D saved states.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streaming_rwkv.ops import cuda
from streaming_rwkv.ops.cuda import Kernel, Launch

SAVED_EVERY = 32  # tokens
_TILE_BYTES, _SMALL_BYTES = 2048, 2688  # TILE and SMALL of kernels/wkv7/chunk.h
_VALUE_TILES = 4
GRADIENTS = Kernel(
    "wkv7/chunked_gradients.cu", "wkv7_chunked_gradients", torch.bfloat16, 128, 2 * (17 * _TILE_BYTES + _SMALL_BYTES)
)


class Shape(NamedTuple):
    """Launch shape of the passes that follow a document; a summary of `Shape` in kernels/wkv7/chunked_chains.cu.

    A block has 64 / blocks_per_chain value rows of one head of one document.
    """

    name: str
    blocks_per_chain: int
    threads: int
    chunks: int  # of 16 tokens: a group
    stages: int  # groups in shared memory
    prepared_stages: int

    def kernel(self, direction: str) -> Kernel:
        tensors = 6 if direction == "forward" else 5
        shared_bytes = self.chunks * (self.stages * tensors * _TILE_BYTES + self.prepared_stages * _SMALL_BYTES)
        name = f"wkv7_chunked_{direction}_{self.name}"
        return Kernel("wkv7/chunked_chains.cu", name, torch.bfloat16, self.threads, shared_bytes)


WIDE = Shape("wide", blocks_per_chain=1, threads=64, chunks=2, stages=2, prepared_stages=1)
NARROW = Shape("narrow", blocks_per_chain=1, threads=128, chunks=4, stages=2, prepared_stages=1)
SPLIT_IN_TWO = Shape("split_in_two", blocks_per_chain=2, threads=160, chunks=3, stages=3, prepared_stages=2)
SPLIT_IN_FOUR = Shape("split_in_four", blocks_per_chain=4, threads=128, chunks=3, stages=3, prepared_stages=2)
SHAPES = (WIDE, NARROW, SPLIT_IN_TWO, SPLIT_IN_FOUR)


def choose_shape(chains: int, multiprocessors: int, shared_bytes: int = 163 << 10) -> Shape:
    """Return the shape that leaves the fewest multiprocessors idle; all shapes give the same bits.

    Args:
        chains: documents times heads, documents counted as if all were as long as the longest.
        shared_bytes: what a block may have of shared memory; 163 KiB on an A100, 99 KiB on consumer GPUs.
    """
    if chains * 4 <= multiprocessors:
        shape = SPLIT_IN_FOUR
    elif chains * 2 <= multiprocessors:
        shape = SPLIT_IN_TWO
    elif chains < multiprocessors * 2:
        shape = NARROW
    else:
        shape = WIDE
    return shape if shape.kernel("forward").shared_bytes <= shared_bytes else WIDE


def _shape(r: Tensor, cu_seqlens: Tensor) -> Shape:
    documents, heads = cu_seqlens.shape[0] - 1, r.shape[2]
    if cu_seqlens.device.type == "cpu" and documents:  # else their number is all that is known
        lengths = cu_seqlens.diff()
        documents = -(-int(lengths.sum()) // max(int(lengths.max()), 1))
    return choose_shape(documents * heads, *_limits(r.device))


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory of a block."""
    properties = torch.cuda.get_device_properties(device)
    # torch's stubs do not know the second one.
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def empty_saved(r: Tensor, documents: int, *, save: bool) -> tuple[Tensor, Tensor]:
    """Room for states (K, H, N, N), halves in the kernels' own order, and their scales (K, H, 4); or for nothing."""
    _, tokens, heads, size = r.shape
    slots = tokens // SAVED_EVERY + documents
    return (
        r.new_empty((slots, heads, size, size) if save else 0, dtype=torch.float16),
        r.new_empty((slots, heads, _VALUE_TILES) if save else 0, dtype=torch.int32),
    )


def forward(
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    *,
    save: bool,
    launch: Launch | None = None,
    shape: Shape | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass.

    Contiguous (1, T, H, N) inputs → y, final_state (D, H, N, N), and for `backward` states and scales, as
    `empty_saved` has them; the last two are empty unless `save`.
    """
    r, log_decay, k, v, a, b = inputs
    documents, heads, size = cu_seqlens.shape[0] - 1, r.shape[2], r.shape[3]
    y = torch.empty_like(r)
    final_state = r.new_empty(documents, heads, size, size, dtype=torch.float32)
    states, scales = empty_saved(r, documents, save=save)
    shape = shape or _shape(r, cu_seqlens)
    tensors = [r, log_decay, k, v, a, b, initial_state, y, final_state, *((states, scales) if save else (None, None))]
    _follow(shape, "forward", r, cu_seqlens, tensors, launch)
    return y, final_state, states, scales


def backward(
    inputs: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    *,
    initial_state: bool,
    launch: Launch | None = None,
    shape: Shape | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs and, if `initial_state`, of the initial state (else an empty tensor).

    Args:
        saved: final_state, states and scales as `forward` returned them.
    """
    r, log_decay, _, _, a, b = inputs
    final_state, states, scales = saved
    documents = cu_seqlens.shape[0] - 1
    gradients = [torch.empty_like(x) for x in inputs]
    dinitial_state = r.new_empty(final_state.shape if initial_state else 0, dtype=torch.float32)
    dstates, dscales = empty_saved(r, documents, save=True)
    shape = shape or _shape(r, cu_seqlens)
    chain = [r, log_decay, a, b, dy, dfinal_state, dinitial_state if initial_state else None, dstates, dscales]
    _follow(shape, "backward", r, cu_seqlens, chain, launch)
    blocks = r.shape[2] * (states.shape[0] + 1)  # one more per head clears the padding
    tensors = [*inputs, dy, states, scales, dstates, dscales, *gradients]
    cuda.run_kernel(GRADIENTS, r, cu_seqlens, blocks, tensors, launch)
    return *gradients, dinitial_state


def _follow(
    shape: Shape,
    direction: str,
    r: Tensor,
    cu_seqlens: Tensor,
    tensors: Sequence[Tensor | None],
    launch: Launch | None,
) -> None:
    blocks = r.shape[2] * cu_seqlens.shape[0] * shape.blocks_per_chain  # one more chain per head: the padding
    cuda.run_kernel(shape.kernel(direction), r, cu_seqlens, blocks, tensors, launch)
