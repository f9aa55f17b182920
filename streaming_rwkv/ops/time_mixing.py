"""The public WKV-7 op: checks, the choice of a kernel, and what torch needs to know of it (fake tensors, autograd).

Shapes: B rows, T tokens, H heads, N head size, D documents. States are [value, key].
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import cpp, cuda, cuda_chunked
from streaming_rwkv.ops.documents import check_bounds
from streaming_rwkv.ops.reference import state_dtype, wkv7_reference

logger = logging.getLogger(__name__)

HEAD_SIZE = 64  # of the kernels
INPUTS = ("r", "log_decay", "k", "v", "a", "b")
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

    float32 and bfloat16 with head size 64 run in a kernel, C++ on the CPU and CUDA on the GPU, each compiled at its
    first use. float64 and other head sizes run in the reference, step by step. The log tells which.

    bfloat16 on a GPU runs in chunks, in fp16 with scales that assume the model's bounds: log_decay ≥ -exp(-0.5), and a
    and b no longer than 1. Beyond some twice of either, results turn into inf and NaN.

        y, state = wkv7(r, log_decay, k, v, a, b, cu_seqlens=torch.tensor([0, 7, 32], dtype=torch.int32))

    Args:
        r, log_decay, k, v, a, b: (B, T, H, N), one dtype of float32, bfloat16 and float64; log_decay < 0.
        initial_state: (num_documents, H, N, N) float32, or None for zeros; float64 where the inputs are.
        cu_seqlens: (num_documents + 1,) int32, rising from 0; the state restarts at each boundary. Needs B == 1. May
            be on the CPU whatever the device of the rest.
    Returns:
        y (B, T, H, N) in v's dtype; final state per document, float32 (float64 where the inputs are).
    Raises:
        ValueError: shape, dtype or device not supported; `cu_seqlens` on the CPU that does not rise from 0.
        KernelError: a kernel that cannot be compiled here, with the remedy.
    Source: RWKV-7 "Goose", arXiv 2503.14456.
    """
    _check((r, log_decay, k, v, a, b), initial_state, cu_seqlens)
    if r.dtype == torch.float64 or r.shape[-1] != HEAD_SIZE:
        _announce("the step-by-step PyTorch reference", r.device.type, r.dtype, r.shape[-1])
        if cu_seqlens is not None:
            check_bounds("wkv7", cu_seqlens, r.shape[1])
        return wkv7_reference(r, log_decay, k, v, a, b, initial_state=initial_state, cu_seqlens=cu_seqlens)
    rows, tokens = r.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (rows + 1) * tokens, max(tokens, 1), dtype=torch.int32)[: rows + 1]
    flat = [r, log_decay, k, v, a, b]
    if rows != 1:
        flat = [x.reshape(1, rows * tokens, *x.shape[2:]) for x in flat]
    differentiable = (*flat, initial_state) if initial_state is not None else flat
    save = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    y, final_state, _, _ = torch.ops.streaming_rwkv.wkv7(*flat, initial_state, cu_seqlens, save)
    return y if rows == 1 else y.reshape(r.shape), final_state


def _check(inputs: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check shapes and dtypes; no value is read, so nothing waits for a device."""
    r = inputs[0]
    if r.ndim != 4:
        raise ValueError(f"wkv7: r has shape {tuple(r.shape)}, expected (B, T, H, N)")
    for name, x in zip(INPUTS[1:], inputs[1:], strict=True):
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
        if cu_seqlens.device.type != "cpu" and cu_seqlens.device != r.device:
            raise ValueError(
                f"wkv7: cu_seqlens is on {cu_seqlens.device}, expected the CPU or {r.device} as the inputs"
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


@functools.cache
def _announce(implementation: str, device: str, dtype: torch.dtype, head_size: int) -> None:
    """Say once which implementation serves these inputs."""
    logger.info("wkv7 for %s on %s, head size %d: %s", dtype, device, head_size, implementation)


def _kernel(r: Tensor) -> Any:
    """Return the module with `forward` and `backward` for inputs like r."""
    match r.device.type:
        case "cpu":
            _announce("the C++ kernel", "cpu", r.dtype, r.shape[-1])
            return cpp
        case "cuda":
            module = _cuda_kernel(r)
            chunked = " in chunks, on tensor cores" if module is cuda_chunked else ""
            _announce(f"the CUDA kernel{chunked}", "cuda", r.dtype, r.shape[-1])
            return module
        case other:
            raise ValueError(f"wkv7: no kernel for inputs on {other}; move them to the CPU or a CUDA device")


def _cuda_kernel(r: Tensor) -> Any:
    """Compute in chunks for bfloat16 if the GPU has tensor cores for it (A100 or newer), otherwise step by step."""
    if r.dtype != torch.bfloat16:
        return cuda
    older = (
        r.device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(r.device) < (8, 0)
    )
    return cuda if older else cuda_chunked


@torch.library.custom_op("streaming_rwkv::wkv7", mutates_args=())
def _forward_op(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, final_state, and two tensors of the kernel's own for its backward pass, empty unless `save`."""
    check_bounds("wkv7", cu_seqlens, r.shape[1])
    inputs = tuple(x.contiguous() for x in (r, log_decay, k, v, a, b))
    initial = initial_state.contiguous() if initial_state is not None else None
    return _kernel(r).forward(inputs, initial, cu_seqlens.contiguous(), save=save)


@_forward_op.register_fake
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, size = r.shape[2:]
    documents = cu_seqlens.shape[0] - 1
    kernel = cpp if r.device.type == "cpu" else _cuda_kernel(r)
    return (
        r.new_empty(r.shape),
        r.new_empty(documents, heads, size, size, dtype=torch.float32),
        *kernel.empty_saved(r, documents, save=save),
    )


@torch.library.custom_op("streaming_rwkv::wkv7_backward", mutates_args=())
def _backward_op(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    final_state: Tensor,
    saved: Tensor,
    also_saved: Tensor,
    dy: Tensor,
    dfinal_state: Tensor | None,
    needs_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six inputs and of the initial state, the last one empty unless needed."""
    return _kernel(r).backward(
        tuple(x.contiguous() for x in (r, log_decay, k, v, a, b)),
        cu_seqlens.contiguous(),
        (final_state.contiguous(), saved.contiguous(), also_saved.contiguous()),
        dy.contiguous(),
        dfinal_state.contiguous() if dfinal_state is not None else None,
        initial_state=needs_initial_state,
    )


@_backward_op.register_fake
def _(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    final_state: Tensor,
    saved: Tensor,
    also_saved: Tensor,
    dy: Tensor,
    dfinal_state: Tensor | None,
    needs_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dr, dlog_decay, dk, dv, da, db = (r.new_empty(r.shape) for _ in range(6))
    dinitial_state = r.new_empty(final_state.shape if needs_initial_state else 0, dtype=torch.float32)
    return dr, dlog_decay, dk, dv, da, db, dinitial_state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *differentiable, cu_seqlens, _ = inputs
    _, final_state, saved, also_saved = output
    ctx.mark_non_differentiable(saved, also_saved)
    ctx.set_materialize_grads(False)  # zeros as large as the saved states
    ctx.save_for_backward(*differentiable[:6], cu_seqlens, final_state, saved, also_saved)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again at each reading
    needs_initial_state = ctx.needs_input_grad[6]
    *gradients, dinitial_state = torch.ops.streaming_rwkv.wkv7_backward(
        *saved, torch.zeros_like(saved[0]) if dy is None else dy, dfinal_state, needs_initial_state
    )
    return *gradients, dinitial_state if needs_initial_state else None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
