"""Output projection and training loss, computed in chunks of tokens so that a batch's logits never exist at once.

At 128 k words of vocabulary, the logits of 8192 tokens and their gradient take 8 GB in float32, more than the rest
of a 0.4B model's step. Here a chunk's logits are computed, reduced to a loss and gradients, and freed.

Shapes: B rows, T tokens, M = B·T, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streaming_rwkv.ops import cross_entropy_


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of `x`: autocast's if it is enabled, otherwise that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Head(nn.Linear):
    """Linear layer that returns logits, or the loss of each target without storing the logits."""

    def __init__(self, hidden_size: int, vocab_size: int, *, chunk_tokens: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.chunk_tokens = chunk_tokens

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of x (B, T, C); with `targets` (B, T) int64, see `head_cross_entropy`."""
        if targets is None:
            return F.linear(x, self.weight)
        return head_cross_entropy(x, self.weight, targets, chunk_tokens=self.chunk_tokens)


def head_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Return the negative log-likelihood of every target, float32 (float64 for float64 inputs), 0 where it is -100.

    The gradient is that of nll + ½·1e-4·max(logits)² for each target ("L2Wrap", which keeps the logits near 0), so
    that `nll.sum() / count` has the reference trainer's gradient for every split of `count` targets into microbatches.

    Gradients are computed together with the loss of a chunk, as if every target's loss had gradient 1. That makes
    `nll.sum()` times any factor cheap; any other use of `nll` is correct too, but computes the logits a second time.

    Args:
        x: (B, T, C); weight: (V, C); targets: (B, T) int64.
        chunk_tokens: rows of logits at a time; the result does not depend on it, up to rounding.
    Source: L2Wrap is BlinkDL's, RWKV-LM/RWKV-v7/train_temp.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    rows = x.reshape(-1, x.shape[-1])
    nll: Tensor = _HeadCrossEntropy.apply(rows, weight, targets.reshape(-1), compute_dtype(x), chunk_tokens, wanted)
    return nll.view(targets.shape)


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk_tokens: int, wanted: bool
    ) -> Tensor:
        nll, *ctx.unit_gradients = _loss_and_gradients(
            x, weight, targets, dtype=dtype, chunk_tokens=chunk_tokens, scale=1.0 if wanted else None
        )
        ctx.save_for_backward(x, weight, targets)
        ctx.options = dtype, chunk_tokens
        return nll

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a sum is one expanded number, so its strides show that all values are equal. The stored
        # gradients are given away, so that they can be scaled in place; a second backward pass computes its own.
        same = gradient.numel() == 1 or not any(gradient.stride())
        grad_x, grad_weight = ctx.unit_gradients
        ctx.unit_gradients = None, None
        if same and grad_x is not None:
            scale = gradient.flatten()[:1]
            return grad_x.mul_(scale), grad_weight.mul_(scale), None, None, None, None
        dtype, chunk_tokens = ctx.options
        x, weight, targets = ctx.saved_tensors
        _, grad_x, grad_weight = _loss_and_gradients(
            x, weight, targets, dtype=dtype, chunk_tokens=chunk_tokens, scale=gradient
        )
        return grad_x, grad_weight, None, None, None, None


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype,
    chunk_tokens: int,
    scale: Tensor | float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return nll (M,), and the gradients of x (M, C) and weight (V, C), for targets (M,).

    `scale` is the gradient of each nll, (M,) or one number; None leaves the gradients out. Products are done in
    `dtype`, the softmax and all sums in float32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    narrow_weight = weight.to(dtype)
    nll = torch.empty(x.shape[0], dtype=wide, device=x.device)
    grad_x = grad_weight = None
    if scale is not None:
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide))
    for start in range(0, x.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk = x[rows].to(dtype)
        logits = chunk @ narrow_weight.T
        row_scales = scale[rows] if isinstance(scale, Tensor) else None
        nll[rows] = cross_entropy_(logits, targets[rows], row_scales, gradient=grad_x is not None)
        if grad_x is None or grad_weight is None:
            continue
        grad_logits = logits
        grad_x[rows] = grad_logits @ narrow_weight
        if grad_weight.dtype == dtype:
            # In place: a separate product would be as large as the weight.
            torch.addmm(grad_weight, grad_logits.T, chunk, out=grad_weight)
        else:
            grad_weight += grad_logits.T @ chunk
    return nll, grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)
