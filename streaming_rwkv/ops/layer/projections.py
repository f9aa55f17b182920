"""Products of normalized, mixed inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.ops import layer_reference as reference
from streaming_rwkv.ops.documents import check_bounds
from streaming_rwkv.ops.layer.dispatch import has_kernel
from streaming_rwkv.ops.layer.norm_mix import norm_mix
from streaming_rwkv.ops.layer.registration import as_rows, as_vector, weight_gradient


def mixed_projections(
    x: Tensor,
    branch: Tensor | None,
    norm: torch.nn.LayerNorm,
    mixes: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    *,
    dtype: torch.dtype,
    last: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Add a branch to the residual stream, normalize, mix each token with the one before, and project.

    With u = norm(x + branch), each mix m gives u_t + (u_{t-1} - u_t)·m, which its weights project.

    Args:
        x: (B, T, C), the residual stream. branch: (B, T, C) in `dtype`, or None.
        mixes: C numbers each, as many as `weights` has groups.
        weights: (out, C) each, grouped by the mix whose result they project.
        dtype: the type of u, the products and their results.
        last: (B, C), u of the token before each row's first, or None for zeros.
        cu_seqlens: (D + 1,) int32, rising from 0, for documents packed in one row; u_{t-1} is 0 where one starts. Rows
            past the last boundary are padding: every result is 0 there, whatever x holds. Excludes `last`.
    Returns:
        x + branch; the projections (B, T, out) in the order of `weights`; u of each row's last token, (B, C), in
        float32 or wider.
    Raises:
        ValueError: boundaries that do not rise from 0 to T or less, more than one row of packed documents, `last` of
            other rows.
    """
    if cu_seqlens is not None and (x.shape[0] != 1 or last is not None):
        raise ValueError(
            f"mixed_projections: {x.shape[0]} rows, last {'given' if last is not None else 'not given'}; documents "
            "are packed in one row (B must be 1) and none continues another (last must be None)"
        )
    if last is not None and last.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"mixed_projections: last has the shape {tuple(last.shape)}, expected {(x.shape[0], x.shape[2])}, a token "
            "of each row"
        )
    fused = (
        has_kernel(x.shape[-1], x)
        and dtype in (torch.float32, torch.bfloat16)
        and (x.dtype, dtype) != (torch.bfloat16, torch.float32)
        and len(mixes) in (1, 6)
    )
    if not fused:
        if cu_seqlens is not None:
            check_bounds("mixed_projections", cu_seqlens, x.shape[1])
        x, mixed, after = reference.norm_mix_reference(
            x, branch, norm.weight, norm.bias, mixes, last=last, cu_seqlens=cu_seqlens, eps=norm.eps, dtype=dtype
        )
        products = [z @ weight.T for z, group in zip(mixed, weights, strict=True) for weight in group]
        return x, products, after
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, non_blocking=True)
    groups = tuple(len(group) for group in weights)
    flat = [weight for group in weights for weight in group]
    if torch.is_grad_enabled():
        residual, after, *products = _MixedProjections.apply(
            x, branch, norm.weight, norm.bias, last, cu_seqlens, norm.eps, dtype, groups, *mixes, *flat
        )
    else:  # products under autocast, which keeps the weights it casts
        residual, _, after, mixed = norm_mix(
            x, branch, norm.weight, norm.bias, mixes, last, cu_seqlens, norm.eps, dtype
        )
        products = [z @ weight.T for z, group in zip(mixed, weights, strict=True) for weight in group]
    return x if branch is None else residual, products, after


class _MixedProjections(torch.autograd.Function):
    """norm_mix and the products of its results, which are not kept: the gradients' kernel makes them once more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        last: Tensor | None,
        cu_seqlens: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        groups: tuple[int, ...],
        *mixes_and_weights: Tensor,
    ) -> tuple[Tensor, ...]:
        mixes, weights = mixes_and_weights[: len(groups)], mixes_and_weights[len(groups) :]
        residual, stats, after, mixed = norm_mix(x, branch, weight, bias, mixes, last, cu_seqlens, eps, dtype)
        owners = [index for index, count in enumerate(groups) for _ in range(count)]
        products = [mixed[owner] @ w.T for owner, w in zip(owners, weights, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if branch is None else residual, stats, weight, bias, last, cu_seqlens, *mixes_and_weights
        )
        ctx.owners, ctx.has_branch, ctx.dtype = owners, branch is not None, dtype
        if branch is None:
            ctx.mark_non_differentiable(residual)
        return residual, after, *products

    @staticmethod
    def backward(
        ctx: Any, dresidual: Tensor | None, dafter: Tensor | None, *dproducts: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        residual, stats, weight, bias, last, cu_seqlens, *rest = ctx.saved_tensors
        mixes, weights = rest[: -len(ctx.owners)], rest[-len(ctx.owners) :]
        dmixed: list[Tensor | None] = [None] * len(mixes)
        for owner, w, dproduct in zip(ctx.owners, weights, dproducts, strict=True):
            if dproduct is None:
                continue
            rows, so_far = dproduct.flatten(0, -2), dmixed[owner]
            dmixed[owner] = rows @ w if so_far is None else so_far.addmm_(rows, w)
        shape = residual.shape
        dmixed_there = [residual.new_zeros(shape, dtype=ctx.dtype) if z is None else z.view(shape) for z in dmixed]
        dx, dbranch, dlast, gradients, mixed = torch.ops.streaming_rwkv.norm_mix_backward(
            residual,
            stats,
            as_vector(weight),
            as_vector(bias),
            as_rows(mixes),
            None if last is None else last.float(),
            cu_seqlens,
            dresidual,
            dmixed_there,
            dafter,
            ctx.has_branch and residual.dtype != ctx.dtype,
        )
        if residual.dtype == ctx.dtype:
            dbranch = dx  # the gradients of a sum
        dweights = [
            None if dproduct is None else weight_gradient(w, mixed[owner], dproduct)
            for owner, w, dproduct in zip(ctx.owners, weights, dproducts, strict=True)
        ]
        dnorm_weight, dnorm_bias, *dmixes = gradients.unbind(0)
        return (
            dx,
            dbranch if ctx.has_branch else None,
            dnorm_weight.to(weight.dtype),
            dnorm_bias.to(bias.dtype),
            None if last is None else dlast.to(last.dtype),
            None,
            None,
            None,
            None,
            *(dmix.view(mix.shape).to(mix.dtype) for dmix, mix in zip(dmixes, mixes, strict=True)),
            *dweights,
        )
