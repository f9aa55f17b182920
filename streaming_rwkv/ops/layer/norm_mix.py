"""Residual addition, LayerNorm, token shift and mixes, one kernel forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streaming_rwkv.ops import launch
from streaming_rwkv.ops.documents import check_bounds
from streaming_rwkv.ops.layer.registration import as_rows, as_vector, define_op, ready, sum_tiles, tiles_of


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor],
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Run the forward kernel with parameters as they are stored; see `_norm_mix_op` for what it returns."""
    last = None if last is None else last.float()
    vectors = as_vector(weight), as_vector(bias), as_rows(mixes)
    result: tuple[Tensor, Tensor, Tensor, list[Tensor]] = torch.ops.streaming_rwkv.norm_mix(
        x, branch, *vectors, last, cu_seqlens, eps, dtype
    )
    return result


def _norm_mix_fake(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    rows, tokens, width = x.shape
    return (
        x.new_empty(0 if branch is None else x.shape),
        x.new_empty(rows * tokens, 2, dtype=torch.float32),
        x.new_empty(rows, width, dtype=torch.float32),
        [x.new_empty(x.shape, dtype=dtype) for _ in range(mixes.shape[0])],
    )


@define_op(
    "norm_mix(Tensor x, Tensor? branch, Tensor weight, Tensor bias, Tensor mixes, Tensor? last, Tensor? cu_seqlens, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor[])",
    _norm_mix_fake,
)
def _norm_mix_op(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Add the branch, normalize, and mix each token with the one before.

    Returns x + branch (empty without a branch), mean and 1/deviation of each token, the last u of each row, the mixes.
    """
    rows, tokens, width = x.shape
    if cu_seqlens is not None:
        check_bounds("mixed_projections", cu_seqlens, tokens)
    residual, stats, after, mixed = _norm_mix_fake(x, branch, weight, bias, mixes, last, cu_seqlens, eps, dtype)
    if cu_seqlens is not None or tokens == 0:
        after.zero_()  # no row continues
    tile, blocks = tiles_of(rows * tokens)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    launch.launcher(x.device)(
        launch.Kernel("norm_mix_forward", (x.dtype, dtype), width, mixes.shape[0]),
        blocks,
        (
            *(rows * tokens, tokens, documents, ready(cu_seqlens), tile, eps, ready(x)),
            ready(None if branch is None else branch.to(dtype)),
            *map(ready, (weight, bias, mixes, last)),
            *(residual, stats, after if cu_seqlens is None else None, *mixed),
        ),
    )
    return residual, stats, after, mixed


def _norm_mix_backward_fake(
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    dresidual: Tensor | None,
    dmixed: list[Tensor],
    dafter: Tensor | None,
    branch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        residual.new_empty(residual.shape),
        dmixed[0].new_empty(residual.shape if branch else 0),
        residual.new_empty(0 if last is None else last.shape, dtype=torch.float32),
        residual.new_empty(2 + len(dmixed), residual.shape[-1], dtype=torch.float32),
        [x.new_empty(x.shape) for x in dmixed],
    )


@define_op(
    "norm_mix_backward(Tensor residual, Tensor stats, Tensor weight, Tensor bias, Tensor mixes, Tensor? last, "
    "Tensor? cu_seqlens, Tensor? dresidual, Tensor[] dmixed, Tensor? dafter, bool branch) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _norm_mix_backward_fake,
)
def _norm_mix_backward_op(
    residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    mixes: Tensor,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    dresidual: Tensor | None,
    dmixed: list[Tensor],
    dafter: Tensor | None,
    branch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gradients of `_norm_mix_op`, and the mixes again.

    Of x, branch and last (empty where there is none), and of weight, bias and mixes together (2 + M, C).
    """
    rows, tokens, width = residual.shape
    dx, dbranch, dlast, _, mixed = _norm_mix_backward_fake(
        residual, stats, weight, bias, mixes, last, cu_seqlens, dresidual, dmixed, dafter, branch
    )
    tile, blocks = tiles_of(rows * tokens)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    partial = stats.new_empty(blocks, 2 + len(dmixed), width)
    launch.launcher(residual.device)(
        launch.Kernel("norm_mix_backward", (residual.dtype, dmixed[0].dtype), width, len(dmixed)),
        blocks,
        (
            *(rows * tokens, tokens, documents, ready(cu_seqlens), tile),
            *map(ready, (residual, stats, weight, bias, mixes, last, dresidual)),
            ready(dafter) if cu_seqlens is None else None,
            *(dx, dbranch if branch else None, None if last is None else dlast, partial),
            *map(ready, dmixed),
            *mixed,
        ),
    )
    return dx, dbranch, dlast, sum_tiles(partial), mixed
