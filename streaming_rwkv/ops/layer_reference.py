"""The definitions of the layer's fused ops in plain PyTorch: every kernel is measured against them.

Shapes: B rows, T tokens, C width, H heads, N head size, M mixes, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from streaming_rwkv.ops.reference import state_dtype

DECAY_SCALE = math.exp(-0.5)  # bounds the decay per step: exp(-DECAY_SCALE) = 0.545 … 1
IGNORED = -100  # the target of a token that has none
L2WRAP = 1e-4


def token_shift(x: Tensor, cu_seqlens: Tensor | None, last: Tensor | None) -> Tensor:
    """Return the token before each of x (B, T, C).

    That is `last` (B, C) or 0 for the first of a row, and 0 where a document starts.
    """
    before = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.to(x.dtype).unsqueeze(1)
    previous = torch.cat([before, x[:, :-1]], dim=1)
    if cu_seqlens is None:
        return previous
    # One more than there are tokens: the last boundary may be the row's end.
    starts = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device)
    starts[cu_seqlens.to(x.device, torch.int64)] = True
    return previous.masked_fill(starts[:-1].view(1, -1, 1), 0)


def norm_mix_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mixes: Sequence[Tensor],
    *,
    last: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Add the branch, normalize, and mix each token with the one before.

    Returns x + branch; for each mix u + (previous u - u)·mix, with u = LayerNorm(x + branch) in `dtype`; the last u.

    Args:
        x, branch: (B, T, C). mixes: C numbers each.
        last: (B, C), u before each row's first token, or None for zeros.
        cu_seqlens: (D + 1,) document boundaries; rows past the last one are padding, where every result is 0.
    """
    tokens = x.shape[1]
    stop = tokens if cu_seqlens is None else int(cu_seqlens[-1])
    if stop < tokens:
        x, branch = x[:, :stop], None if branch is None else branch[:, :stop]
    x = x if branch is None else x + branch
    u = F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)
    delta = token_shift(u, cu_seqlens, last) - u
    mixed = [u + delta * mix.reshape(-1).to(dtype) for mix in mixes]
    after = u[:, -1] if stop else u.new_zeros(x.shape[0], x.shape[2])
    if stop < tokens:
        x, *mixed = (F.pad(z, (0, 0, 0, tokens - stop)) for z in (x, *mixed))
    return x, mixed, after.to(state_dtype(dtype))


def wkv7_inputs_reference(
    w: Tensor,
    a: Tensor,
    k: Tensor,
    v: Tensor,
    v_lora: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    v0: Tensor | None,
    *,
    head_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `streaming_rwkv.ops.wkv7_inputs` by its definition."""
    dtype, wide = k.dtype, torch.promote_types(k.dtype, torch.float32)
    heads = (k.shape[-1] // head_size, head_size)
    w0, a0, k_k, k_a = (z.reshape(-1) for z in (w0, a0, k_k, k_a))
    log_decay = -DECAY_SCALE * torch.sigmoid(w0.to(wide) + w)
    if v_first is not None:
        assert v0 is not None
        assert v_lora is not None
        v = v + (v_first - v) * torch.sigmoid(v0.reshape(-1) + v_lora).to(dtype)
    share = torch.sigmoid(a0 + a).to(dtype)
    removal = (k * k_k.to(dtype)).unflatten(-1, heads)
    removal = F.normalize(removal.to(wide), dim=-1, eps=1e-12).to(dtype)
    k = k * (1 + (share - 1) * k_a.to(dtype))
    log_decay, k, v, share = (z.unflatten(-1, heads) for z in (log_decay.to(dtype), k, v, share))
    return log_decay, k, v, -removal, removal * share


def wkv7_output_reference(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, *, eps: float
) -> Tensor:
    """Compute `streaming_rwkv.ops.wkv7_output` by its definition."""
    dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
    normal = F.group_norm(y.flatten(2).flatten(0, 1).to(wide), y.shape[2], weight.to(wide), bias.to(wide), eps)
    bonus = (r * k * r_k.to(dtype)).sum(-1, keepdim=True, dtype=wide).to(dtype) * v
    return (normal.to(dtype).view(gate.shape) + bonus.flatten(2)) * gate


def relu_squared_reference(x: Tensor) -> Tensor:
    """Return max(x, 0)²."""
    positive = torch.relu(x)
    return positive * positive  # not square(): autocast would make that float32


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, scales: Tensor | None, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute `streaming_rwkv.ops.cross_entropy_` by its definition, with the gradient as a tensor of its own."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    counted = targets != IGNORED
    target = targets.clamp_min(0).unsqueeze(1)
    found = logits.to(wide, copy=True)
    top, top_index = found.max(dim=1, keepdim=True)
    target_logit = found.gather(1, target)
    # One (rows, V) buffer throughout: logits, then exponentials, then probabilities, then gradients.
    total = found.sub_(top).exp_().sum(dim=1, keepdim=True)
    nll = ((total.log() + top - target_logit).squeeze(1)).where(counted, 0)
    if not gradient:
        return nll, None
    scale = counted.to(wide).mul_(1 if scales is None else scales).unsqueeze(1)
    found.mul_(scale / total)
    found.scatter_add_(1, target, -scale)
    found.scatter_add_(1, top_index, L2WRAP * scale * top)
    return nll, found.to(logits.dtype)
