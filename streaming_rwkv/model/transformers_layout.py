"""Names and configuration of transformers' own RWKV-7 (`Rwkv7ForCausalLM`).

Its weights are BlinkDL's under the prefix `rwkv7.`, but for `head.weight`: LoRA factors are not transposed, and layer 0
has the unused `v0`, `v1` and `v2`. Its `model_type` is that of fla's layout too, so names tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streaming_rwkv.model.config import RWKV7Config

_PREFIX = "rwkv7."
_HEAD = "head.weight"
_OURS = re.compile(r"(emb|ln_out|blocks\.\d+)\.")


def is_transformers_name(name: str) -> bool:
    """Return True for a name of transformers' layout; fla's has none of them."""
    return name == _HEAD or (name.startswith(_PREFIX) and _OURS.match(name, len(_PREFIX)) is not None)


def from_transformers_name(name: str) -> str:
    """Invert `to_transformers_name`."""
    return name.removeprefix(_PREFIX)


def to_transformers_name(name: str) -> str:
    """Return transformers' name of a parameter: "blocks.3.att.w1" → "rwkv7.blocks.3.att.w1"."""
    return name if name == _HEAD else _PREFIX + name


def unused_weights(config: RWKV7Config, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return layer 0's `v0`, `v1` and `v2`, which are stored and never read, as zeros."""
    width, rank = config.hidden_size, config.v_rank
    shapes = {"v0": (1, 1, width), "v1": (width, rank), "v2": (rank, width)}
    return {f"blocks.0.att.{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def to_transformers(state: Mapping[str, Tensor], config: RWKV7Config, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights under transformers' names, each with a storage of its own."""
    complete = {**unused_weights(config, dtype=dtype), **state}
    return {to_transformers_name(name): value.contiguous().clone() for name, value in complete.items()}


def transformers_values(
    config: RWKV7Config, *, norm_eps: float, dtype: torch.dtype, bos_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """Return the content of config.json, the fields of `Rwkv7Config`."""
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "head_dim": config.head_size,
        "num_heads": config.num_heads,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.a_rank,
        "v_low_rank_dim": config.v_rank,
        "gate_low_rank_dim": config.gate_rank,
        "intermediate_size": config.ffn_size,
        "norm_eps": norm_eps,
        "norm_bias": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "wkv_state_dtype": "float32",
        "wkv_implementation": "eager",
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
