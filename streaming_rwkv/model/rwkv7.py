"""RWKV-7 "Goose": the network, over rows of tokens or over documents packed in one row, and with a carried state.

    tokens ─ emb ─ ln0 ─┬─ block: x + att(ln1 x), x + ffn(ln2 x) ─┬─ ln_out ─ head ─ logits | loss of each target
                        └──────────────── L times ───────────────┘

The sum x + branch is made where it is read: each branch goes to the next norm beside x.

Parameters have BlinkDL's names, so a state dict of this model is his `.pth` but for layer 0's unused v0, v1, v2.
Under autocast the residual stream stays in the parameters' type and everything within a block is in autocast's;
norms, decays and the softmax are done in float32 or wider.

Shapes: B rows, T tokens, C hidden size, H heads, N head size, D documents.
Source: RWKV-7 "Goose", arXiv 2503.14456; RWKV-LM/RWKV-v7/train_temp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from streaming_rwkv.model.checkpointing import recomputed
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.head import Head, compute_dtype
from streaming_rwkv.ops import (
    cast_together,
    mixed_projections,
    relu_squared_projection,
    wkv7,
    wkv7_inputs,
    wkv7_output,
)

__all__ = ["RWKV7", "LayerState", "RWKV7Config"]

GROUP_NORM_EPS = 64e-5


class LayerState(NamedTuple):
    """State of a layer after the tokens so far."""

    att_shift: Tensor  # (B, C) float32, the last token's input of the time mixing
    wkv: Tensor  # (B, H, N, N) float32, [value, key]
    ffn_shift: Tensor  # (B, C) float32, the last token's input of the channel mixing


def _vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class TimeMixing(nn.Module):
    """Attention's place in RWKV-7; `layer` 0 gives its values to all later layers.

    With u = norm(x + branch) and u_m = u + (previous u - u) x_m for each mix m:

        r, k, v = receptance u_r, key u_k, value u_v        v ← v + (v_first - v) σ(v0 + (u_v v1) v2)
        log_decay = -exp(-½) σ(w0 + tanh(u_w w1) w2)        a = σ(a0 + (u_a a1) a2)
        κ = normalize(k k_k) per head                       k ← k (1 + (a - 1) k_a)
        y = wkv7(r, log_decay, k, v, -κ, κ a)               branch = output ((ln_x y + (Σ r k r_k) v) σ(u_g g1) g2)
    """

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
        self,
        x: Tensor,
        branch: Tensor | None,
        norm: nn.LayerNorm,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LayerState | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Mix over time.

        x, branch (B, T, C), v_first (B, T, C) of layer 0 → x + branch, our branch (B, T, C), v_first; the last token's
        input and WKV states after it.
        """
        dtype = compute_dtype(x)
        linears = (self.receptance.weight, self.key.weight, self.value.weight, self.output.weight)
        loras = (self.w1, self.w2, self.a1, self.a2, self.g1, self.g2)
        residual = (self.v1, self.v2) if self.has_value_residual else ()
        receptance, key, value, output, w1, w2, a1, a2, g1, g2, *v12 = cast_together(
            (*linears, *loras, *residual), dtype
        )
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        projections = ((receptance,), (w1.T,), (key,), (value, *(v1.T for v1 in v12[:1])), (a1.T,), (g1.T,))
        last = state.att_shift if state else None
        x, (r, w, k, v, *v_hidden, a, g), shift = mixed_projections(
            x, branch, norm, mixes, projections, dtype=dtype, last=last, cu_seqlens=cu_seqlens
        )
        v_first = v if v_first is None else v_first
        decay, share = (torch.tanh(w), w2, self.w0), (a, a2, self.a0)
        value_residual = (v_hidden[0], v12[1], self.v0) if self.has_value_residual else None
        log_decay, k, v, removal, replacement = wkv7_inputs(
            k, v, v_first if value_residual else None, decay, share, value_residual, self.k_k, self.k_a,
            head_size=self.head_shape[1],
        )  # fmt: skip
        r = r.unflatten(-1, self.head_shape)
        before = state.wkv if state else None
        y, wkv = wkv7(r, log_decay, k, v, removal, replacement, initial_state=before, cu_seqlens=cu_seqlens)
        gate = torch.sigmoid(g) @ g2
        z = wkv7_output(y, r, k, v, gate, self.ln_x.weight, self.ln_x.bias, self.r_k, eps=self.ln_x.eps)
        return x, z @ output.T, v_first, shift, wkv


def _lora(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Offset (1, 1, C), down (C, rank), up (rank, C)."""
    return _vector(1, 1, width), _vector(width, rank), _vector(rank, width)


class ChannelMixing(nn.Module):
    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = _vector(1, 1, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.value = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, branch: Tensor, norm: nn.LayerNorm, cu_seqlens: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + branch and this layer's branch, all (B, T, C), and the last token's input."""
        dtype = compute_dtype(x)
        key, value = cast_together((self.key.weight, self.value.weight), dtype)
        last = state.ffn_shift if state else None
        x, (hidden,), shift = mixed_projections(
            x, branch, norm, (self.x_k,), ((key,),), dtype=dtype, last=last, cu_seqlens=cu_seqlens
        )
        return x, relu_squared_projection(hidden, value), shift


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

    @recomputed
    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        v_first: Tensor | None,
        cu_seqlens: Tensor | None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, LayerState]:
        """Apply the layer.

        x, branch (B, T, C) → x and branch after this layer, whose sum the next one reads; layer 0's values; the state
        for a next token.
        """
        if self.ln0 is not None:
            x = self.ln0(x)
        x, branch, v_first, att_shift, wkv = self.att(x, branch, self.ln1, v_first, cu_seqlens, state)
        x, branch, ffn_shift = self.ffn(x, branch, self.ln2, cu_seqlens, state)
        return x, branch, v_first, LayerState(att_shift, wkv, ffn_shift)


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
                Rows past the last boundary are padding. May be on the CPU whatever the model's device.
            targets: (B, T) int64, -100 where a token has none (padding).
        Returns:
            Without targets the logits (B, T, V); with targets their negative log-likelihood (B, T) in float32, 0
            where there is none. Its gradient includes L2Wrap; `head.head_cross_entropy` says what it costs.
        Raises:
            ValueError: cu_seqlens with more than one row, or of another type; targets of another shape or type; tokens
                of another shape, or, on the CPU, outside of the vocabulary.
        """
        if targets is not None and (targets.shape != tokens.shape or targets.dtype != torch.int64):
            raise ValueError(
                f"targets: found {tuple(targets.shape)} {targets.dtype}, expected {tuple(tokens.shape)} torch.int64, "
                "the shape of tokens"
            )
        x, branch, v_first = self._embedded(tokens), None, None
        for block in self.blocks:
            x, branch, v_first, _ = block(x, branch, v_first, cu_seqlens)
        assert branch is not None
        x = self.ln_out(x + branch)
        return self.head(x.to(compute_dtype(x)), targets)

    def step(self, tokens: Tensor, state: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Read further tokens of each row: the cost is that of these tokens, however many came before.

        Args:
            tokens: (B, T) int64, T ≥ 1.
            state: what the last call returned, or None at the beginning.
        Returns:
            logits (B, V) of the token to come; the state after these tokens.
        Raises:
            ValueError: a state of other rows or layers, or tokens as `forward` refuses them.
        """
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state: found that of {len(state)} layers, this model has {len(self.blocks)}")
        x, branch, v_first = self._embedded(tokens), None, None
        after = []
        for index, block in enumerate(self.blocks):
            before = None if state is None else state[index]
            x, branch, v_first, layer_state = block(x, branch, v_first, None, before)
            after.append(layer_state)
        assert branch is not None
        x = self.ln_out(x[:, -1:] + branch[:, -1:])
        return self.head(x.to(compute_dtype(x))).squeeze(1), after

    def _embedded(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens: found the shape {tuple(tokens.shape)}, expected (B, T) with T of at least 1")
        try:
            x: Tensor = self.emb(tokens)
        except IndexError:  # of the CPU alone; on a GPU the check would have to wait for the device
            least, most = tokens.aminmax()
            raise ValueError(
                f"tokens: found ids from {least} to {most}, expected 0 to {self.config.vocab_size - 1}"
            ) from None
        return x
