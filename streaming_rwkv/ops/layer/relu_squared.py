"""ReLU² and its projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops import layer_reference as reference
from streaming_rwkv.ops.layer.dispatch import has_kernel
from streaming_rwkv.ops.layer.registration import define_op, ready, tiles_of, weight_gradient


def relu_squared_projection(x: Tensor, weight: Tensor) -> Tensor:
    """max(x, 0)² @ weight.T: x (B, T, F), weight (C, F) → (B, T, C). The squares are not kept for the backward pass."""
    if not has_kernel(x.shape[-1], x):
        return reference.relu_squared_reference(x) @ weight.T
    if not torch.is_grad_enabled():
        squared: Tensor = torch.ops.streaming_rwkv.relu_squared(x)
        return squared @ weight.T
    product: Tensor = _ReluSquaredProjection.apply(x, weight)
    return product


class _ReluSquaredProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        squared: Tensor = torch.ops.streaming_rwkv.relu_squared(x)
        return squared @ weight.T

    @staticmethod
    def backward(ctx: Any, dproduct: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx = dproduct @ weight
        squared = torch.ops.streaming_rwkv.relu_squared_backward_(x, dx)
        return dx, weight_gradient(weight, squared, dproduct)


@define_op("relu_squared(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def _relu_squared_op(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    tile, blocks = tiles_of(tokens)
    launch.launcher(x.device)(
        launch.Kernel("relu_squared_forward", (x.dtype,), width), blocks, (tokens, tile, ready(x), out)
    )
    return out


@define_op("relu_squared_backward_(Tensor x, Tensor(a!) dout) -> Tensor", lambda x, dout: x.new_empty(x.shape))
def _relu_squared_backward_op(x: Tensor, dout: Tensor) -> Tensor:
    """Return the squares again, and leave the gradient of x in place of theirs."""
    assert dout.is_contiguous()
    out = x.new_empty(x.shape)
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    tile, blocks = tiles_of(tokens)
    kernel = launch.Kernel("relu_squared_backward", (x.dtype,), width)
    launch.launcher(x.device)(kernel, blocks, (tokens, tile, ready(x), dout, out))
    return out
