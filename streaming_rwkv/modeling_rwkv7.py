"""RWKV-7 for `transformers` in plain PyTorch: self-contained exports carry this file beside their weights.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

It needs nothing but torch and transformers. A row may have padding anywhere, as `attention_mask` says: padding leaves
the state as it is, and its logits are those of the token before it. `generate` carries the state, whose size never
grows. WKV-7 is computed in float32, in chunks of matrix products.

Shapes: B rows, T tokens, C hidden size, H heads, N head size. Parameters have the names of `fla`.
Source: RWKV-7 "Goose", arXiv 2503.14456.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

CHUNK_TOKENS = 16  # decays of as many tokens multiply to more than e⁻¹⁰, so that they can be divided by
DECAY_SCALE = 0.6065306597126334  # exp(-1/2)


class RWKV7Config(PretrainedConfig):
    """The shape of a model, in the fields of fla's configuration."""

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012  # as transformers reads it

    def __init__(self, **options: Any) -> None:
        sizes = {"vocab_size": 65536, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
        ranks = {"decay_low_rank_dim": 64, "a_low_rank_dim": 64, "v_low_rank_dim": 32, "gate_low_rank_dim": 128}
        others = {"head_dim": 64, "norm_eps": 1e-5, "tie_word_embeddings": False}
        super().__init__(**{**sizes, **ranks, **others, **options})


class LayerState(NamedTuple):
    """State of a layer after the tokens so far."""

    att_shift: Tensor  # (B, C), the last token's input of the time mixing
    wkv: Tensor  # (B, H, N, N), [value, key]
    ffn_shift: Tensor  # (B, C), the last token's input of the channel mixing


class RWKV7State:
    """State of all layers after the first `length` columns of the rows."""

    def __init__(self, layers: list[LayerState], length: int) -> None:
        self.layers, self.length = layers, length

    def reorder_cache(self, beams: Tensor) -> None:
        """Replace each row by that of its beam, as beam search asks."""
        self.layers = [LayerState(*(x.index_select(0, beams.to(x.device)) for x in layer)) for layer in self.layers]


@dataclass
class RWKV7Output(ModelOutput):
    """The loss if there were labels, logits (B, T, V), and the state after the tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: RWKV7State | None = None


class Places(NamedTuple):
    """Places of the tokens that are no padding: 0 is the state before a row, t + 1 the row's token t."""

    mask: Tensor  # (B, T, 1) bool, False for padding
    newest: Tensor  # (B, T, 1), of the newest token at t
    before: Tensor  # (B, T, 1), of the newest token before t

    @classmethod
    def of(cls, mask: Tensor) -> Places:
        newest = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).cummax(dim=1).values
        return cls(*(x.unsqueeze(-1) for x in (mask, newest, F.pad(newest[:, :-1], (1, 0)))))

    def shift(self, u: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the token before each of u (B, T, C), after `last` (B, C), and the new last tokens."""
        tokens = torch.cat([last.to(u.dtype).unsqueeze(1), u], dim=1)
        shifted = tokens.gather(1, torch.cat([self.before, self.newest[:, -1:]], dim=1).expand_as(tokens))
        return shifted[:, :-1], shifted[:, -1]


def wkv7(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (diag(exp(log_decay_t)) + a_t b_tᵀ) + v_t k_tᵀ, y_t = S_t r_t.

    In a chunk S_t = Z_t diag(exp(total_t)), with the sum of its log-decays up to t: each token adds outer products to
    Z, and what they remove, Z_{t-1} a_t, solves a triangular system.

    Args:
        inputs: r, log_decay, k, v, a, b, all (B, T, H, N) and of the state's type.
        state: (B, H, N, N), [value, key].
    Returns:
        y (B, T, H, N), the state after the tokens.
    """
    outputs = []
    chunks = (x.transpose(1, 2).split(CHUNK_TOKENS, dim=2) for x in inputs)
    for r, log_decay, k, v, a, b in zip(*chunks, strict=True):
        total = log_decay.cumsum(dim=2)
        r, a = r * total.exp(), a * (total - log_decay).exp()
        k, b = k * (-total).exp(), b * (-total).exp()
        known = a @ state.mT + (a @ k.mT).tril(-1) @ v
        removed = torch.linalg.solve_triangular(-(a @ b.mT).tril(-1), known, upper=False, unitriangular=True)
        outputs.append(r @ state.mT + (r @ k.mT).tril() @ v + (r @ b.mT).tril() @ removed)
        state = (state + v.mT @ k + removed.mT @ b) * total[:, :, -1:].exp()
    return torch.cat(outputs, dim=2).transpose(1, 2), state


class LoRA(nn.Module):
    """A matrix of low rank with a function in its middle, and an offset."""

    def __init__(self, width: int, rank: int, middle: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(width, rank, bias=False), middle, nn.Linear(rank, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class TimeMixing(nn.Module):
    """Attention's place in RWKV-7; layer 0 gives its values to all later layers."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = (width // config.head_dim, config.head_dim)
        mixes = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(6))
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = mixes
        self.k_k, self.k_a = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.r_k = nn.Parameter(torch.zeros(self.heads))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w_lora = LoRA(width, config.decay_low_rank_dim, nn.Tanh())
        self.a_lora = LoRA(width, config.a_low_rank_dim, nn.Identity())
        self.v_lora = LoRA(width, config.v_low_rank_dim, nn.Identity()) if layer else None
        self.g_lora = LoRA(width, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.heads[0], width, eps=config.head_dim * config.norm_eps)

    def forward(
        self, u: Tensor, before: Tensor, v_first: Tensor | None, mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix each of u (B, T, C) with the tokens before → output, layer 0's values, the WKV state after."""
        mixes = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        u_r, u_w, u_k, u_v, u_a, u_g = (u + (before - u) * mix for mix in mixes)
        r, k, v = self.r_proj(u_r), self.k_proj(u_k), self.v_proj(u_v)
        log_decay = -DECAY_SCALE * torch.sigmoid(self.w_lora(u_w).to(state.dtype))
        share = torch.sigmoid(self.a_lora(u_a))
        removal = F.normalize((k * self.k_k).unflatten(-1, self.heads).to(state.dtype), dim=-1)
        k = k * (1 + (share - 1) * self.k_a)
        if self.v_lora is not None:
            v = v + (v_first - v) * torch.sigmoid(self.v_lora(u_v))
        v_first = v if v_first is None else v_first
        log_decay = log_decay * mask  # padding neither decays the state nor adds to it
        k_real, share_real = k * mask, share * mask
        heads = (x.unflatten(-1, self.heads).to(state.dtype) for x in (r, log_decay, k_real, v, share_real))
        r, log_decay, k, v, share = heads
        with torch.autocast(u.device.type, enabled=False):
            y, state = wkv7((r, log_decay, k, v, -removal, removal * share), state)
            y = F.group_norm(
                y.flatten(2).flatten(0, 1), self.heads[0], self.g_norm.weight.to(y.dtype),
                self.g_norm.bias.to(y.dtype), self.g_norm.eps,
            )  # fmt: skip
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.o_proj((y.view(u.shape) + bonus.flatten(2)).to(u.dtype) * self.g_lora(u_g)), v_first, state


class ChannelMixing(nn.Module):
    """A feed-forward layer over each token and the one before."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, u: Tensor, before: Tensor) -> Tensor:
        return self.value(torch.relu(self.key(u + (before - u) * self.x_k)) ** 2)


class Layer(nn.Module):
    """x + attn(attn_norm x), then x + ffn(ffn_norm x)."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if layer == 0 else None
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn, self.ffn = TimeMixing(config, layer), ChannelMixing(config)

    def forward(
        self, x: Tensor, v_first: Tensor | None, places: Places, state: LayerState
    ) -> tuple[Tensor, Tensor, LayerState]:
        """Apply the layer to x (B, T, C) → x, layer 0's values, the state after."""
        x = x if self.pre_norm is None else self.pre_norm(x)
        u = self.attn_norm(x)
        before, att_shift = places.shift(u, state.att_shift)
        mixed, v_first, wkv = self.attn(u, before, v_first, places.mask, state.wkv)
        x = x + mixed
        u = self.ffn_norm(x)
        before, ffn_shift = places.shift(u, state.ffn_shift)
        return x + self.ffn(u, before), v_first, LayerState(att_shift, wkv, ffn_shift)


class RWKV7Model(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, ids: Tensor, mask: Tensor, state: RWKV7State | None) -> tuple[Tensor, RWKV7State]:
        """Read ids (B, T), with mask (B, T) → hidden (B, T, C), the state after."""
        x, places, v_first = self.embeddings(ids), Places.of(mask), None
        before = state or RWKV7State([self._empty(x)] * len(self.layers), 0)
        after = []
        for layer, layer_state in zip(self.layers, before.layers, strict=True):
            x, v_first, layer_state = layer(x, v_first, places, layer_state)
            after.append(layer_state)
        x = self.norm(x).gather(1, (places.newest - 1).clamp_min(0).expand_as(x))
        return x, RWKV7State(after, before.length + ids.shape[1])

    def _empty(self, x: Tensor) -> LayerState:
        head, wide = self.config.head_dim, torch.promote_types(x.dtype, torch.float32)
        shift = x.new_zeros(x.shape[0], x.shape[2])
        return LayerState(shift, x.new_zeros(x.shape[0], x.shape[2] // head, head, head, dtype=wide), shift)


class RWKV7ForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model, with the methods that transformers asks for."""

    config_class = RWKV7Config
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012  # as transformers reads it
    _is_stateful = True  # a state cannot be cut back to fewer tokens

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: RWKV7State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> RWKV7Output | tuple[Any, ...]:
        """Return the logits of the tokens that follow those of `state`.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T or more), 0 for padding; its last T columns are used.
            labels: (B, T), the ids again, or -100 where there is no loss.
            logits_to_keep: return the logits of this many last tokens; 0 for all.
            options: of transformers' loss, such as num_items_in_batch; others are ignored.
        """
        rows, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length:
            raise ValueError(f"attention_mask: found shape {tuple(mask.shape)}, expected ({rows}, {length} or more)")
        x, state = self.model(input_ids, mask[:, mask.shape[1] - length :].bool(), state)
        logits = self.lm_head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        output = RWKV7Output(loss=loss, logits=logits, state=None if use_cache is False else state)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: RWKV7State | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of `forward`, with the tokens that the state has not seen."""
        unseen = input_ids[:, 0 if state is None else state.length :]
        kept = {name: kwargs.get(name) for name in ("attention_mask", "use_cache")}
        return {"input_ids": unseen, "state": state, "logits_to_keep": 1, **kept}

    def _update_model_kwargs_for_generation(
        self, outputs: RWKV7Output, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *arguments, **options)
        # Beam search reorders what it finds under the names that versions of transformers give to a cache.
        names = () if outputs.state is None else ("state", "past_key_values", "cache")
        return updated | dict.fromkeys(names, outputs.state)
