"""GGUF files as llama.cpp's converter writes them for RWKV-7: names, shapes, types and metadata.

Layer 0 gets copies of `a0`, `a1` and `a2` as `v0`, `v1` and `v2`, which llama.cpp loads and does not use. Vectors, the
mixes of the token shift and the decay's LoRA are float32 in every file; the rest has the file's type.

Source: llama.cpp, convert_hf_to_gguf.py (`Rwkv7Model`); docs/gguf.md in ggml for the format, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from streaming_rwkv.filesystem import atomic_file
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.marked_files import CheckpointError

VERSION = 3
ALIGNMENT = 32
QUANTIZATION_VERSION = 2
CONTEXT_LENGTH = 1 << 20  # RWKV has no limit; llama.cpp wants a number

Kind = Literal["uint32", "int32", "float32", "bool", "string"]
_KINDS: dict[Kind, tuple[int, str]] = {
    "uint32": (4, "<I"),
    "int32": (5, "<i"),
    "float32": (6, "<f"),
    "bool": (7, "<?"),
    "string": (8, ""),
}
_ARRAY = 9
_TENSOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type: the type of most tensors

_OUTER = {
    "token_embd.weight": "emb.weight",
    "token_embd_norm.weight": "blocks.0.ln0.weight",
    "token_embd_norm.bias": "blocks.0.ln0.bias",
    "output_norm.weight": "ln_out.weight",
    "output_norm.bias": "ln_out.bias",
    "output.weight": "head.weight",
}
_BLOCK = {
    **{f"{theirs}.{end}": f"{ours}.{end}"
       for theirs, ours in {"attn_norm": "ln1", "attn_norm_2": "ln2", "time_mix_ln": "att.ln_x"}.items()
       for end in ("weight", "bias")},
    **{f"time_mix_{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "output")},
    **{f"time_mix_{name}.weight": f"att.{name}" for name in ("k_k", "k_a", "r_k", "g1", "g2")},
    **{f"time_mix_{letter}{part}.weight": f"att.{letter}{part}" for letter in "wav" for part in "012"},
    "channel_mix_lerp_k.weight": "ffn.x_k",
    "channel_mix_key.weight": "ffn.key.weight",
    "channel_mix_value.weight": "ffn.value.weight",
}  # fmt: skip
_LERP = "time_mix_lerp_fused.weight"
_MIXES = "rwkvag"
_FLAT = ("0.weight", "k_k.weight", "k_a.weight", "r_k.weight", "lerp_k.weight")
_LORA_FACTORS = tuple(f"time_mix_{letter}{part}.weight" for letter in "wavg" for part in "12")
_FLOAT32 = ("time_mix_w1.weight", "time_mix_w2.weight", _LERP)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A value of the metadata, or an array of values."""

    key: str
    kind: Kind
    value: object


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A tokenizer in GGUF's terms: a field for its kind, a token and a token type for each id, and further fields."""

    tokens: Sequence[bytes]
    types: Sequence[int]
    fields: Sequence[Field]


def write_gguf(
    state: Mapping[str, Tensor],
    config: RWKV7Config,
    path: Path,
    *,
    dtype: torch.dtype,
    vocabulary: Vocabulary,
    name: str,
) -> None:
    """Write a GGUF file, one tensor at a time; it appears completely or not at all.

    Args:
        state: weights under BlinkDL's names.
        dtype: float32, float16 or bfloat16.
        name: of the model, `general.name`.
    Raises:
        CheckpointError: a value is not finite in its type.
    """
    plan = list(_tensors(config))
    fields = _fields(config, dtype=dtype, vocabulary=vocabulary, name=name)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(plan), len(fields)))
        for field in fields:
            file.write(_encoded(field))
        offset = 0
        for tensor_name, make in plan:
            value = make(state)
            kind = _dtype_of(tensor_name, value, dtype)
            dimensions = list(reversed(value.shape))
            file.write(_string(tensor_name.encode()) + struct.pack("<I", len(dimensions)))
            file.write(struct.pack(f"<{len(dimensions)}QIQ", *dimensions, _TENSOR_TYPES[kind], offset))
            offset += _padded(value.numel() * kind.itemsize)
        _pad(file)
        for tensor_name, make in plan:
            value = make(state)
            converted = value.to(_dtype_of(tensor_name, value, dtype)).contiguous()
            if not converted.isfinite().all():
                raise CheckpointError(
                    f"{path}: {tensor_name}: has values that are not finite, or too large for {dtype}; take bfloat16 "
                    "or float32, or an older checkpoint"
                )
            file.write(converted.flatten().view(torch.uint8).numpy().data)
            _pad(file)


def _tensors(config: RWKV7Config) -> Iterator[tuple[str, Callable[[Mapping[str, Tensor]], Tensor]]]:
    """Yield each tensor's name, and the function that makes it from the state."""

    def one(ours: str, theirs: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
        def make(state: Mapping[str, Tensor]) -> Tensor:
            value = state[ours].detach()
            # Linear weights there: the factors multiply from the right here.
            return value.T if theirs.endswith(_LORA_FACTORS) else value.flatten() if theirs.endswith(_FLAT) else value

        return make

    def mixes(layer: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return lambda state: torch.stack([state[f"blocks.{layer}.att.x_{mix}"].view(1, 1, -1) for mix in _MIXES])

    for theirs, ours in _OUTER.items():
        yield theirs, one(ours, theirs)
    for layer in range(config.num_layers):
        yield f"blk.{layer}.{_LERP}", mixes(layer)
        for theirs, ours in _BLOCK.items():
            source = ours.replace("att.v", "att.a") if layer == 0 and ours in _UNUSED else ours
            yield f"blk.{layer}.{theirs}", one(f"blocks.{layer}.{source}", theirs)


_UNUSED = ("att.v0", "att.v1", "att.v2")


def _dtype_of(name: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if value.ndim <= 1 or name.endswith(_FLOAT32) else dtype


def _fields(config: RWKV7Config, *, dtype: torch.dtype, vocabulary: Vocabulary, name: str) -> list[Field]:
    def rwkv7(key: str, value: int) -> Field:
        return Field(key=f"rwkv7.{key}", kind="uint32", value=value)

    padding = config.vocab_size - len(vocabulary.tokens)
    first = len(vocabulary.tokens)
    tokens = [*vocabulary.tokens, *(f"[PAD{first + number}]".encode() for number in range(padding))]
    return [
        Field(key="general.architecture", kind="string", value="rwkv7"),
        Field(key="general.type", kind="string", value="model"),
        Field(key="general.name", kind="string", value=name),
        Field(key="general.file_type", kind="uint32", value=_FILE_TYPES[dtype]),
        Field(key="general.quantization_version", kind="uint32", value=QUANTIZATION_VERSION),
        rwkv7("context_length", CONTEXT_LENGTH),
        rwkv7("embedding_length", config.hidden_size),
        rwkv7("block_count", config.num_layers),
        Field(key="rwkv7.attention.layer_norm_epsilon", kind="float32", value=1e-5),
        rwkv7("wkv.head_size", config.head_size),
        rwkv7("attention.decay_lora_rank", config.decay_rank),
        rwkv7("attention.iclr_lora_rank", config.a_rank),
        rwkv7("attention.value_residual_mix_lora_rank", config.v_rank),
        rwkv7("attention.gate_lora_rank", config.gate_rank),
        rwkv7("feed_forward_length", config.ffn_size),
        rwkv7("attention.head_count", 0),  # required by llama.cpp, and unused
        *vocabulary.fields,
        Field(key="tokenizer.ggml.tokens", kind="string", value=tokens),
        Field(key="tokenizer.ggml.token_type", kind="int32", value=[*vocabulary.types, *[UNUSED_TOKEN] * padding]),
    ]


UNUSED_TOKEN = 5  # gguf.TokenType.UNUSED


def _encoded(field: Field) -> bytes:
    number, form = _KINDS[field.kind]

    def scalar(value: object) -> bytes:
        if field.kind == "string":
            return _string(value if isinstance(value, bytes) else str(value).encode())
        return struct.pack(form, value)

    key = _string(field.key.encode())
    if not isinstance(field.value, list):
        return key + struct.pack("<I", number) + scalar(field.value)
    return key + struct.pack("<IIQ", _ARRAY, number, len(field.value)) + b"".join(map(scalar, field.value))


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (_padded(file.tell()) - file.tell()))
