"""The public WKV-7 op: checks here, the arithmetic in `reference`.

Shapes: B rows, T tokens, H heads, N head size, D documents. States are [value, key].
"""

from __future__ import annotations

import torch
from torch import Tensor

from streaming_rwkv.ops.reference import state_dtype, wkv7_reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def wkv7(
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
    """RWKV-7 time mixing: S_t = S_{t-1} (diag(d_t) + a_t b_t^T) + v_t k_t^T, y_t = S_t r_t, d = exp(log_decay).

    Without `cu_seqlens` every row is a document. With it, rows past `cu_seqlens[-1]` are padding: whatever they
    hold, y is 0 there and so are their gradients.

    Args:
        r, log_decay, k, v, a, b: (B, T, H, N), one dtype of float32, bfloat16 and float64; log_decay < 0.
        initial_state: (num_documents, H, N, N) float32, or None for zeros; float64 where the inputs are.
        cu_seqlens: (num_documents + 1,) int32, rising from 0; the state restarts at each boundary. Needs B == 1. May
            lie on the CPU whatever the device of the rest.
    Returns:
        y (B, T, H, N) in v's dtype; final state per document, float32 (float64 where the inputs are).
    Raises:
        ValueError: shape, dtype or head size not supported on this device.
    Source: RWKV-7 "Goose", arXiv 2503.14456.
    """
    _check((r, log_decay, k, v, a, b), initial_state, cu_seqlens)
    return wkv7_reference(r, log_decay, k, v, a, b, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _check(inputs: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """What shapes and dtypes alone can tell; no value is read, so nothing waits for a device."""
    r = inputs[0]
    if r.ndim != 4:
        raise ValueError(f"wkv7: r has shape {tuple(r.shape)}, expected (B, T, H, N)")
    for name, x in zip(("log_decay", "k", "v", "a", "b"), inputs[1:], strict=True):
        if x.shape != r.shape or x.dtype != r.dtype or x.device != r.device:
            raise ValueError(
                f"wkv7: {name} is {tuple(x.shape)} {x.dtype} on {x.device}, r is {tuple(r.shape)} {r.dtype} on "
                f"{r.device}; all six inputs need one shape, dtype and device"
            )
    if r.dtype not in _DTYPES:
        raise ValueError(f"wkv7: inputs are {r.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    documents = r.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"wkv7: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, expected (num_documents + 1,) int32"
            )
        if documents != 1:
            raise ValueError(f"wkv7: {documents} rows with cu_seqlens; documents are packed in one row, so B must be 1")
        documents = cu_seqlens.shape[0] - 1
    expected = (documents, r.shape[2], r.shape[3], r.shape[3])
    if initial_state is not None and (
        tuple(initial_state.shape) != expected
        or initial_state.dtype != state_dtype(r.dtype)
        or initial_state.device != r.device
    ):
        raise ValueError(
            f"wkv7: initial_state is {tuple(initial_state.shape)} {initial_state.dtype} on {initial_state.device}, "
            f"expected {expected} {state_dtype(r.dtype)} on {r.device}"
        )
