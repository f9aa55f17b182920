"""The definition of the WKV-7 recurrence, one step at a time, in plain PyTorch: every kernel is measured against it.

Shapes: B rows, T tokens, H heads, N head size, D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of states for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wkv7_reference(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`streaming_rwkv.ops.wkv7` on any device and for any head size, differentiable by autograd; slow.

    Args, returns: as `streaming_rwkv.ops.wkv7`.
    """
    tokens, heads, head_size = r.shape[1:]
    if cu_seqlens is None:
        bounds = [0, tokens]
        rows = documents = r.shape[0]
    else:
        bounds = cu_seqlens.tolist()
        rows, documents = 1, len(bounds) - 1
    if initial_state is None:
        initial_state = r.new_zeros(documents, heads, head_size, head_size, dtype=state_dtype(r.dtype))
    inputs = (r, log_decay, k, v, a, b)
    pieces, states = [], []
    # Without cu_seqlens, the rows are the documents, all of one length: one scan takes them together.
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        y, state = _scan([x[:, start:stop] for x in inputs], initial_state[index : index + rows])
        pieces.append(y)
        states.append(state)
    padding = r.new_zeros(rows, tokens - bounds[-1], heads, head_size)
    return torch.cat([*pieces, padding], dim=1), torch.cat(states) if states else initial_state.clone()


def _scan(inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Scan inputs (B, T, H, N) from the state (B, H, N, N) before them → y (B, T, H, N), the state after them."""
    if inputs[0].shape[1] == 0:
        return torch.zeros_like(inputs[0]), state.clone()
    outputs = []
    for step in zip(*(x.to(state.dtype).unbind(1) for x in inputs), strict=True):
        r, log_decay, k, v, a, b = step
        removed = torch.einsum("bhij,bhj->bhi", state, a)
        state = (
            state * log_decay.exp().unsqueeze(-2)
            + removed.unsqueeze(-1) * b.unsqueeze(-2)
            + v.unsqueeze(-1) * k.unsqueeze(-2)
        )
        outputs.append(torch.einsum("bhij,bhj->bhi", state, r))
    return torch.stack(outputs, dim=1).to(inputs[0].dtype), state
