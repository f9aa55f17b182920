"""Output of WKV-7 before its projection: GroupNorm, bonus and gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops import layer_reference as reference
from streaming_rwkv.ops.layer.dispatch import WIDTH_UNIT, has_kernel
from streaming_rwkv.ops.layer.registration import define_op, ready, sum_tiles, tiles_of


def wkv7_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, *, eps: float
) -> Tensor:
    """(GroupNorm(y) + bonus) · gate, a head a group; the bonus of a head is (Σ r k r_k) v.

    Args:
        y, r, k, v: (B, T, H, N). gate: (B, T, C). All in one dtype.
        weight, bias: (C,), of the norm. r_k: (H, N).
    Returns:
        (B, T, C).
    """
    if not has_kernel(gate.shape[-1], y, r, k, v, gate) or y.shape[-1] != WIDTH_UNIT:
        return reference.wkv7_output_reference(y, r, k, v, gate, weight, bias, r_k, eps=eps)
    flat = (x.flatten(2) for x in (y, r, k, v))
    parameters = (x.reshape(-1).float() for x in (weight, bias, r_k))
    out: Tensor = torch.ops.streaming_rwkv.wkv7_output(*flat, gate, *parameters, eps)
    return out


_WKV7_OUTPUT = "Tensor y, Tensor r, Tensor k, Tensor v, Tensor gate, Tensor weight, Tensor bias, Tensor r_k, float eps"


@define_op(f"wkv7_output({_WKV7_OUTPUT}) -> Tensor", lambda y, *rest: y.new_empty(y.shape))
def _wkv7_output_op(y: Tensor, *rest: Any) -> Tensor:
    *inputs, eps = (y, *rest)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    tokens, width = y.shape[0] * y.shape[1], y.shape[2]
    tile, blocks = tiles_of(tokens)
    kernel = launch.Kernel("wkv7_output_forward", (y.dtype,), width)
    launch.launcher(y.device)(kernel, blocks, (tokens, tile, eps, *map(ready, inputs), out))
    return out


def _wkv7_output_backward_fake(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(y.new_empty(y.shape) for _ in range(5)), y.new_empty(3, y.shape[-1], dtype=torch.float32)


@define_op(
    f"wkv7_output_backward({_WKV7_OUTPUT}, Tensor dout) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _wkv7_output_backward_fake,
)
def _wkv7_output_backward_op(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of y, r, k, v, gate, and of weight, bias and r_k together (3, C)."""
    *inputs, eps, dout = (y, *rest)
    *found, sums = _wkv7_output_backward_fake(y)
    tokens, width = y.shape[0] * y.shape[1], y.shape[2]
    tile, blocks = tiles_of(tokens)
    partial = sums.new_empty(blocks, 3, width)
    kernel = launch.Kernel("wkv7_output_backward", (y.dtype,), width)
    launch.launcher(y.device)(kernel, blocks, (tokens, tile, eps, *map(ready, (*inputs, dout)), *found, partial))
    return *found, sum_tiles(partial)


def _wkv7_output_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _wkv7_output_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *found, sums = torch.ops.streaming_rwkv.wkv7_output_backward(*ctx.saved_tensors, ctx.eps, dout)
    return *found, *sums.unbind(0), None


torch.library.register_autograd(
    "streaming_rwkv::wkv7_output", _wkv7_output_backward, setup_context=_wkv7_output_context
)
