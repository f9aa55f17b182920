"""The output projection and the training loss, by chunks of tokens: the logits of a batch never exist whole.

At 128 k words of vocabulary, the logits of 8192 tokens and their gradient take 8 GB in float32, more than the rest
of a 0.4B model's step. Here a chunk's logits are made, reduced to a loss and to gradients, and dropped.

Shapes: B rows, T tokens, M = B·T, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streaming_rwkv.ops import cross_entropy_


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of `x` are done in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Head(nn.Linear):
    """Logits, or the loss of each target without the logits."""

    def __init__(self, hidden_size: int, vocab_size: int, *, chunk_tokens: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.chunk_tokens = chunk_tokens

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x (B, T, C) → logits (B, T, V); with `targets` (B, T) int64, see `head_cross_entropy`."""
        if targets is None:
            return F.linear(x, self.weight)
        return head_cross_entropy(x, self.weight, targets, chunk_tokens=self.chunk_tokens)


def head_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Negative log-likelihood of every target, float32 (float64 for float64 inputs), 0 where it is -100.

    The gradient is that of nll + ½·1e-4·max(logits)² for each target ("L2Wrap", which keeps the logits near 0), so
    that `nll.sum() / count` has the reference trainer's gradient for every split of `count` targets into microbatches.

    Gradients are computed together with the loss, while a chunk's logits are at hand, as if every target's loss had
    gradient 1. That makes `nll.sum()` times any factor cheap; any other use of `nll` is right too, and pays for
    computing the logits a second time.

    Args:
        x: (B, T, C); weight: (V, C); targets: (B, T) int64.
        chunk_tokens: rows of logits at a time; the same result for any, up to rounding.
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
        nll, *ctx.of_unit = _loss_and_gradients(
            x, weight, targets, dtype=dtype, chunk_tokens=chunk_tokens, scale=1.0 if wanted else None
        )
        ctx.save_for_backward(x, weight, targets)
        ctx.options = dtype, chunk_tokens
        return nll

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a sum is one number, expanded: no value need be read to see that all are equal. The stored
        # gradients are given away, so that they can be scaled in place; a second backward computes its own.
        same = gradient.numel() == 1 or not any(gradient.stride())
        of_x, of_weight = ctx.of_unit
        ctx.of_unit = None, None
        if same and of_x is not None:
            scale = gradient.flatten()[:1]
            return of_x.mul_(scale), of_weight.mul_(scale), None, None, None, None
        dtype, chunk_tokens = ctx.options
        x, weight, targets = ctx.saved_tensors
        _, of_x, of_weight = _loss_and_gradients(
            x, weight, targets, dtype=dtype, chunk_tokens=chunk_tokens, scale=gradient
        )
        return of_x, of_weight, None, None, None, None


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype,
    chunk_tokens: int,
    scale: Tensor | float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x (M, C), weight (V, C), targets (M,) → nll (M,) and the gradients of x and weight.

    `scale` is the gradient of each nll, (M,) or one number; None leaves the gradients out. Products are done in
    `dtype`, the softmax and all sums in float32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    narrow_weight = weight.to(dtype)
    nll = torch.empty(x.shape[0], dtype=wide, device=x.device)
    of_x = of_weight = None
    if scale is not None:
        of_x = torch.empty_like(x)
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide))
    for start in range(0, x.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk = x[rows].to(dtype)
        logits = chunk @ narrow_weight.T
        row_scales = scale[rows] if isinstance(scale, Tensor) else None
        nll[rows] = cross_entropy_(logits, targets[rows], row_scales, gradient=of_x is not None)
        if of_x is None or of_weight is None:
            continue
        of_logits = logits
        of_x[rows] = of_logits @ narrow_weight
        if of_weight.dtype == dtype:
            # In place: a product of its own would be as large as the weight.
            torch.addmm(of_weight, of_logits.T, chunk, out=of_weight)
        else:
            of_weight += of_logits.T @ chunk
    return nll, of_x, None if of_weight is None else of_weight.to(weight.dtype)
