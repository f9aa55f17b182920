"""RWKV-7 "Goose": the network, over rows of tokens or over documents packed in one row, and with a carried state.

    tokens ─ emb ─ ln0 ─┬─ block: x + att(ln1 x), x + ffn(ln2 x) ─┬─ ln_out ─ head ─ logits | loss of each target
                        └──────────────── L times ───────────────┘

Parameters have BlinkDL's names, so a state dict of this model is his `.pth` but for layer 0's unused v0, v1, v2.
Under autocast the residual stream stays in the parameters' type and everything within a block is in autocast's;
norms, decays and the softmax are done in float32 or wider.

Shapes: B rows, T tokens, C hidden size, H heads, N head size, D documents.
Source: RWKV-7 "Goose", arXiv 2503.14456; RWKV-LM/RWKV-v7/train_temp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.head import Head, compute_dtype
from streaming_rwkv.ops import wkv7

__all__ = ["RWKV7", "LayerState", "RWKV7Config"]

GROUP_NORM_EPS = 64e-5
DECAY_SCALE = math.exp(-0.5)  # bounds the decay per step: exp(-DECAY_SCALE) = 0.545 … 1


class LayerState(NamedTuple):
    """What a layer remembers of the tokens so far."""

    att_shift: Tensor  # (B, C) the last token's input of the time mixing
    wkv: Tensor  # (B, H, N, N) float32, [value, key]
    ffn_shift: Tensor  # (B, C) the last token's input of the channel mixing


class Documents(NamedTuple):
    """Where the documents of a packed row begin, in the two forms that layers want."""

    cu_seqlens: Tensor | None  # (D + 1,) int32 as the op takes it; None: every row is a document
    starts: Tensor | None  # (1, T, 1) bool, True where the previous token is another document's


def token_shift(x: Tensor, starts: Tensor | None, last: Tensor | None) -> Tensor:
    """x (B, T, C) → the token before each; at the first of a row `last` (B, C) or 0, and 0 where a document starts."""
    before = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last.unsqueeze(1)
    previous = torch.cat([before, x[:, :-1]], dim=1)
    return previous if starts is None else previous.masked_fill(starts, 0)


def _vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class TimeMixing(nn.Module):
    """Attention's place in RWKV-7; `layer` 0 gives its values to all later layers."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_shape = (config.num_heads, config.head_size)
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (_vector(1, 1, width) for _ in range(6))
        self.w0, self.w1, self.w2 = _lora(width, config.decay_rank)
        self.a0, self.a1, self.a2 = _lora(width, config.a_rank)
        self.has_value_residual = layer > 0
        if self.has_value_residual:
            self.v0, self.v1, self.v2 = _lora(width, config.v_rank)
        _, self.g1, self.g2 = _lora(width, config.gate_rank)
        self.k_k, self.k_a = _vector(1, 1, width), _vector(1, 1, width)
        self.r_k = _vector(*self.head_shape)
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.ln_x = nn.GroupNorm(config.num_heads, width, eps=GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, v_first: Tensor | None, documents: Documents, state: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), v_first (B, T, C) of layer 0 → output (B, T, C), v_first, WKV states after the last token."""
        dtype = x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        delta = token_shift(x, documents.starts, state.att_shift if state else None) - x
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        xr, xw, xk, xv, xa, xg = (x + delta * mix.to(dtype) for mix in mixes)

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        log_decay = -DECAY_SCALE * torch.sigmoid(self.w0.to(wide) + torch.tanh(xw @ self.w1) @ self.w2)
        if not self.has_value_residual:
            v_first = v
        else:
            assert v_first is not None
            share = torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2).to(dtype)
            v = v + (v_first - v) * share
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2).to(dtype)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2

        removal = (k * self.k_k.to(dtype)).unflatten(-1, self.head_shape)
        removal = F.normalize(removal.to(wide), dim=-1, eps=1e-12).to(dtype)
        k = k * (1 + (a - 1) * self.k_a.to(dtype))
        r, k, v, a = (z.unflatten(-1, self.head_shape) for z in (r, k, v, a))
        y, wkv = wkv7(
            r,
            log_decay.to(dtype).unflatten(-1, self.head_shape),
            k,
            v,
            -removal,
            removal * a,
            initial_state=state.wkv if state else None,
            cu_seqlens=documents.cu_seqlens,
        )
        weight, bias = self.ln_x.weight.to(wide), self.ln_x.bias.to(wide)
        y = F.group_norm(y.flatten(2).flatten(0, 1).to(wide), self.ln_x.num_groups, weight, bias, self.ln_x.eps)
        y = y.to(dtype).view(x.shape)
        bonus = (r * k * self.r_k.to(dtype)).sum(-1, keepdim=True, dtype=wide).to(dtype) * v
        return self.output((y + bonus.flatten(2)) * gate), v_first, wkv


def _lora(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Offset (1, 1, C), down (C, rank), up (rank, C)."""
    return _vector(1, 1, width), _vector(width, rank), _vector(rank, width)


class ChannelMixing(nn.Module):
    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = _vector(1, 1, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, documents: Documents, state: LayerState | None) -> Tensor:
        """x (B, T, C) → (B, T, C)."""
        delta = token_shift(x, documents.starts, state.ffn_shift if state else None) - x
        hidden = torch.relu(self.key(x + delta * self.x_k.to(x.dtype)))
        return self.value(hidden * hidden)  # not square(): autocast would make that float32


class Block(nn.Module):
    """One layer; the unit of sharding and of activation checkpointing."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.ln0 = nn.LayerNorm(config.hidden_size) if layer == 0 else None
        self.ln1 = nn.LayerNorm(config.hidden_size)
        self.ln2 = nn.LayerNorm(config.hidden_size)
        self.att = TimeMixing(config, layer)
        self.ffn = ChannelMixing(config)

    def forward(
        self, x: Tensor, v_first: Tensor | None, documents: Documents, state: LayerState | None = None
    ) -> tuple[Tensor, Tensor, LayerState]:
        """x (B, T, C) → x after this layer, layer 0's values, what a next token needs to know."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # There is no randomness within a block, so none is saved for the second pass.
            result: tuple[Tensor, Tensor, LayerState] = checkpoint(
                self._mix, x, v_first, documents, state, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return self._mix(x, v_first, documents, state)

    def _mix(
        self, x: Tensor, v_first: Tensor | None, documents: Documents, state: LayerState | None
    ) -> tuple[Tensor, Tensor, LayerState]:
        if self.ln0 is not None:
            x = self.ln0(x)
        dtype = compute_dtype(x)
        att_in = self.ln1(x).to(dtype)
        att_out, v_first, wkv = self.att(att_in, v_first, documents, state)
        x = x + att_out
        ffn_in = self.ln2(x).to(dtype)
        x = x + self.ffn(ffn_in, documents, state)
        return x, v_first, LayerState(att_in[:, -1], wkv, ffn_in[:, -1])


class RWKV7(nn.Module):
    """The language model. Its parameters are zero until `init.initialize` or a checkpoint fills them."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size)
        self.head = Head(config.hidden_size, config.vocab_size, chunk_tokens=config.loss_chunk_tokens)
        for block in self.blocks:
            block._fsdp_wrap = True  # how Composer knows what to shard

    def forward(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss of each target.

        Args:
            tokens: (B, T) int64. Every row is a document, unless `cu_seqlens` is given.
            cu_seqlens: (D + 1,) int32 document boundaries, rising from 0; needs B == 1. No document sees another.
                Rows past the last boundary are padding. May lie on the CPU whatever the model's device.
            targets: (B, T) int64, -100 where a token has none (padding).
        Returns:
            Without targets the logits (B, T, V); with targets their negative log-likelihood (B, T) in float32, 0
            where there is none. Its gradient includes L2Wrap; `head.head_cross_entropy` says what it costs.
        Raises:
            ValueError: cu_seqlens with more than one row, or of another type.
        """
        x = self.emb(tokens)
        documents = _documents(cu_seqlens, tokens)
        v_first = None
        for block in self.blocks:
            x, v_first, _ = block(x, v_first, documents)
        x = self.ln_out(x)
        return self.head(x.to(compute_dtype(x)), targets)

    def step(self, tokens: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Read further tokens of each row: the cost is that of these tokens, however many came before.

        Args:
            tokens: (B, T) int64, T ≥ 1.
            state: what the last call returned, or None at the beginning.
        Returns:
            logits (B, V) of the token to come; the state after these tokens.
        """
        x = self.emb(tokens)
        v_first = None
        after = []
        for index, block in enumerate(self.blocks):
            before = None if state is None else state[index]
            x, v_first, layer_state = block(x, v_first, Documents(None, None), before)
            after.append(layer_state)
        x = self.ln_out(x[:, -1:])
        return self.head(x.to(compute_dtype(x))).squeeze(1), after


def _documents(cu_seqlens: Tensor | None, tokens: Tensor) -> Documents:
    if cu_seqlens is None:
        return Documents(None, None)
    # One more than there are tokens: the last boundary may be the row's end.
    starts = torch.zeros(tokens.shape[1] + 1, dtype=torch.bool, device=tokens.device)
    starts[cu_seqlens.to(tokens.device, torch.int64, non_blocking=True)] = True
    return Documents(cu_seqlens, starts[:-1].view(1, -1, 1))
