"""Weights in the type of the products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops.layer.dispatch import uses_definitions


def cast_together(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Weights in `dtype`, all in one launch, and their gradients back in one.

    Autocast casts them one by one. Where no gradient is wanted it also keeps what it has cast, so there the weights are
    returned as they are, for autocast to cast.
    """
    if not torch.is_grad_enabled() or all(weight.dtype == dtype for weight in weights) or uses_definitions():
        return weights
    cast: tuple[Tensor, ...] = _CastTogether.apply(dtype, *weights)
    return cast


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(cast, list(weights))
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(n, gradient) for n, gradient in enumerate(gradients) if gradient is not None]
        result: list[Tensor | None] = [None] * len(gradients)
        cast = [torch.empty_like(gradient, dtype=ctx.dtypes[n]) for n, gradient in there]
        if there:
            torch._foreach_copy_(cast, [gradient for _, gradient in there])
        for (n, _), x in zip(there, cast, strict=True):
            result[n] = x
        return None, *result
