"""Names and layout of parameters in the Hugging Face implementations `fla` and `rwkv7_hf`.

They compute what BlinkDL's RWKV-7 does for head size 64 alone: see `check_group_norm`.
"""

from __future__ import annotations

import re

from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.model.rwkv7 import GROUP_NORM_EPS

LAYER_NORM_EPS = 1e-5  # torch's default, used by every RWKV model

_OUTER_NAMES = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_LORA_NAMES = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_BLOCK_NAMES = {
    **{f"{ours}.{end}": f"{theirs}.{end}"
       for ours, theirs in {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm"}.items()
       for end in ("weight", "bias")},
    **{f"att.{ours}.weight": f"attn.{theirs}.weight"
       for ours, theirs in {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}.items()},
    **{f"att.{letter}{part}": f"attn.{letter}_lora.lora.{end}"
       for letter in "wavg" for part, end in _LORA_NAMES.items() if (letter, part) != ("g", "0")},
    **{f"att.{name}": f"attn.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")},
    **{f"ffn.{name}": f"ffn.{name}" for name in ("x_k", "key.weight", "value.weight")},
}  # fmt: skip
_FROM_OUTER = {theirs: ours for ours, theirs in _OUTER_NAMES.items()}
_FROM_BLOCK = {theirs: ours for ours, theirs in _BLOCK_NAMES.items()}
FLAT = ("lora.2.bias", ".k_k", ".k_a", "ffn.x_k")  # (C,) there, (1, 1, C) here


def to_huggingface_name(name: str) -> str:
    """Return Hugging Face's name of a parameter: "blocks.3.att.w1" → "model.layers.3.attn.w_lora.lora.0.weight".

    Raises:
        KeyError: our models have no parameter of this name.
    """
    if not name.startswith("blocks."):
        return _OUTER_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK_NAMES[rest]}"


def from_huggingface_name(name: str) -> str | None:
    """Invert `to_huggingface_name`; return None for a name that it never returns."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if not found:
        return _FROM_OUTER.get(name)
    rest = _FROM_BLOCK.get(found[2])
    return None if rest is None else f"blocks.{found[1]}.{rest}"


def is_transposed(huggingface_name: str) -> bool:
    """Return True for LoRA factors, which multiply from the right here, and are `Linear` weights there."""
    return "_lora.lora." in huggingface_name and huggingface_name.endswith(".weight")


def check_group_norm(head_size: int, *, where: str) -> None:
    """Refuse a head size for which those implementations compute something else.

    Raises:
        CheckpointError: names the head size.
    """
    # There the GroupNorm's epsilon is head_dim · norm_eps; BlinkDL's is 64e-5 for every head size.
    if abs(head_size * LAYER_NORM_EPS - GROUP_NORM_EPS) > 1e-9:
        raise CheckpointError(
            f"{where}: found {head_size}; Hugging Face implementations agree with BlinkDL's for head size 64 alone"
        )
