"""Shape of an RWKV-7 model, and the sizes that BlinkDL released."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from streaming_rwkv.config import Config
from streaming_rwkv.quantities import PositiveInt

MOST_LAYERS = 10_000

Preset = Literal["0.1B", "0.4B", "1.5B", "2.9B"]

# BlinkDL's World models. Their LoRA ranks follow older formulas than the one below (the 0.4B model's follow none), so
# they are listed; the parameter counts in the RWKV-7 paper confirm them.
_PRESET_FIELDS = ("num_layers", "hidden_size", "decay_rank", "a_rank", "v_rank", "gate_rank", "head_size", "ffn_size")
PRESETS: dict[Preset, dict[str, int]] = {
    "0.1B": dict(zip(_PRESET_FIELDS, (12, 768, 64, 64, 32, 128, 64, 3072), strict=True)),
    "0.4B": dict(zip(_PRESET_FIELDS, (24, 1024, 64, 64, 32, 128, 64, 4096), strict=True)),
    "1.5B": dict(zip(_PRESET_FIELDS, (24, 2048, 96, 96, 64, 256, 64, 8192), strict=True)),
    "2.9B": dict(zip(_PRESET_FIELDS, (32, 2560, 96, 96, 64, 320, 64, 10240), strict=True)),
}


def _rank(factor: float) -> Any:
    """Return a field for a LoRA rank, by default the reference trainer's: factor · √C, rounded to 32."""

    def from_hidden_size(fields: dict[str, Any]) -> int:
        # Missing if the hidden size itself is invalid: then that error is reported.
        return max(32, round(factor * fields.get("hidden_size", 0) ** 0.5 / 32) * 32)

    return Field(default_factory=from_hidden_size)


class RWKV7Config(Config):
    """Shape and memory options of a model; give `preset`, or `hidden_size` and `num_layers`.

    Fields:
        preset: a released size; it determines the whole shape except the vocabulary.
        vocab_size: rows of embedding and head, V.
        hidden_size: C, a multiple of the head size.
        num_layers: L.
        head_size: N; 64 in the released models and the fused kernels.
        ffn_size: width of the channel mixing, 4·C in every released model.
        decay_rank, a_rank, v_rank, gate_rank: LoRA ranks; by default the reference trainer's formula.
        activation_checkpointing: keep only the input of each block, and recompute the rest in the backward pass.
        loss_chunk_tokens: chunk size, in tokens, of the cross-entropy; bounds the memory of the logits.
    """

    preset: Preset | None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt = Field(le=MOST_LAYERS)
    head_size: PositiveInt = 64
    ffn_size: PositiveInt = Field(default_factory=lambda fields: 4 * fields.get("hidden_size", 1))
    decay_rank: PositiveInt = _rank(2.5)
    a_rank: PositiveInt = _rank(2.5)
    v_rank: PositiveInt = _rank(1.7)
    gate_rank: PositiveInt = _rank(5.0)
    activation_checkpointing: bool = False
    loss_chunk_tokens: PositiveInt = 2048

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        preset = PRESETS[values["preset"]]
        for name, value in preset.items():
            if values.get(name, value) != value:
                raise ValueError(
                    f"{name}: found {values[name]!r}, but preset {values['preset']!r} has {value}; leave it out, or "
                    "set preset to null and give hidden_size and num_layers"
                )
        return {**values, **preset}

    @model_validator(mode="after")
    def _whole_heads(self) -> RWKV7Config:
        if self.hidden_size % self.head_size:
            raise ValueError(
                f"hidden_size: found {self.hidden_size}, which is no multiple of head_size {self.head_size}; "
                f"the nearest is {max(1, round(self.hidden_size / self.head_size)) * self.head_size}"
            )
        return self

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_size
