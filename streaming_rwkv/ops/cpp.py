"""The C++ kernel of WKV-7, called through ctypes: no torch headers, so any compiler goes with any torch.

Shapes: T tokens of all documents, H heads, N = 64, D documents, K = T // 64 + D saved states.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from streaming_rwkv.ops.build import build_cpp, kernel_source
from streaming_rwkv.ops.threads import Threads, torch_threads

SAVED_EVERY = 64  # tokens
_DIMENSIONS = ("tokens", "heads", "documents")
_POINTERS = (
    "cu_seqlens", "r", "log_decay", "k", "v", "a", "b", "initial_state", "y", "final_state", "removed", "states",
    "dy", "dfinal_state", "dr", "dlog_decay", "dk", "dv", "da", "db", "dinitial_state",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`Wkv7Call` of kernels/wkv7/wkv7.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _DIMENSIONS),
        ("threads", Threads),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernel; the first call on a machine compiles it."""
    return ctypes.CDLL(str(build_cpp(kernel_source("wkv7/wkv7.cpp"))))


def _run(name: str, cu_seqlens: Tensor, **tensors: Tensor | None) -> None:
    r = tensors["r"]
    assert r is not None
    call = _Call(
        tokens=r.shape[1],
        heads=r.shape[2],
        documents=cu_seqlens.shape[0] - 1,
        threads=torch_threads(),
        cu_seqlens=cu_seqlens.data_ptr(),
        **{key: x.data_ptr() for key, x in tensors.items() if x is not None},
    )
    getattr(library(), f"wkv7_{name}_{str(r.dtype).removeprefix('torch.')}")(ctypes.byref(call))


def empty_saved(r: Tensor, documents: int, *, save: bool) -> tuple[Tensor, Tensor]:
    """Room for removed (T, H, N) and states (K, H, N, N), float32; or for nothing."""
    _, tokens, heads, size = r.shape
    slots = tokens // SAVED_EVERY + documents
    return (
        r.new_empty((tokens, heads, size) if save else 0, dtype=torch.float32),
        r.new_empty((slots, heads, size, size) if save else 0, dtype=torch.float32),
    )


def forward(
    inputs: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor, *, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward pass.

    Contiguous (1, T, H, N) inputs → y, final_state (D, H, N, N), and for `backward` removed (T, H, N) and states
    (K, H, N, N); the last two are empty unless `save`.
    """
    r, log_decay, k, v, a, b = inputs
    heads, size = r.shape[2:]
    documents = cu_seqlens.shape[0] - 1
    y = torch.empty_like(v)
    final_state = r.new_empty(documents, heads, size, size, dtype=torch.float32)
    removed, states = empty_saved(r, documents, save=save)
    _run(
        "forward",
        cu_seqlens,
        r=r,
        log_decay=log_decay,
        k=k,
        v=v,
        a=a,
        b=b,
        initial_state=initial_state,
        y=y,
        final_state=final_state,
        removed=removed if save else None,
        states=states if save else None,
    )
    return y, final_state, removed, states


def backward(
    inputs: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    dfinal_state: Tensor | None,
    *,
    initial_state: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs and, if `initial_state`, of the initial state (else an empty tensor).

    Args:
        saved: final_state, removed and states as `forward` returned them.
    """
    r, log_decay, k, v, a, b = inputs
    final_state, removed, states = saved
    gradients = [torch.empty_like(x) for x in inputs]
    dinitial_state = torch.empty_like(final_state) if initial_state else r.new_empty(0, dtype=torch.float32)
    _run(
        "backward",
        cu_seqlens,
        r=r,
        log_decay=log_decay,
        k=k,
        v=v,
        a=a,
        b=b,
        final_state=final_state,
        removed=removed,
        states=states,
        dy=dy,
        dfinal_state=dfinal_state,
        **{f"d{name}": x for name, x in zip(("r", "log_decay", "k", "v", "a", "b"), gradients, strict=True)},
        dinitial_state=dinitial_state if initial_state else None,
    )
    return *gradients, dinitial_state
