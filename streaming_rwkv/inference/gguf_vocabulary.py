"""Tokenizers in GGUF's terms, for RWKV World and for byte-level BPE as llama.cpp splits words."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from streaming_rwkv.config import UserError
from streaming_rwkv.model.gguf import UNUSED_TOKEN, Field, Vocabulary
from streaming_rwkv.tokenizer import WORLD_VOCABULARY, Tokenizer
from streaming_rwkv.version import PROGRAM

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # gguf.TokenType
_WORLD_END_OF_TURN = 261  # "\n\n", which ends a turn of World's chat models
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GgufError(UserError):
    """A tokenizer that llama.cpp does not have."""


def gguf_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return a tokenizer's vocabulary as llama.cpp's converter writes it.

    Raises:
        GgufError: llama.cpp would give other ids: not byte-level BPE, or it does not know how words are split.
    """
    with TemporaryDirectory(prefix="gguf-") as folder:
        tokenizer.save(folder)
        if tokenizer.kind == "rwkv-world":
            return _world((Path(folder) / WORLD_VOCABULARY).read_text(encoding="utf-8"))
        definition = json.loads((Path(folder) / "tokenizer.json").read_bytes())
    return _bpe(definition, name=tokenizer.name, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


def _world(vocabulary: str) -> Vocabulary:
    tokens = {0: b"<s>"}
    for line in vocabulary.splitlines():
        number, _, rest = line.partition(" ")
        written = ast.literal_eval(rest.rpartition(" ")[0])
        token = written if isinstance(written, bytes) else written.encode()
        tokens[int(number)] = repr(token)[2:-1].encode()  # llama.cpp reads Python's escapes
    return Vocabulary(
        tokens=_filled(tokens),
        types=[CONTROL, *(NORMAL if number in tokens else UNUSED_TOKEN for number in range(1, max(tokens) + 1))],
        fields=[
            Field(key="tokenizer.ggml.model", kind="string", value="rwkv"),
            Field(key="tokenizer.ggml.bos_token_id", kind="uint32", value=0),
            Field(key="tokenizer.ggml.eos_token_id", kind="uint32", value=0),
            Field(key="tokenizer.ggml.eot_token_id", kind="uint32", value=_WORLD_END_OF_TURN),
            Field(key="tokenizer.chat_template", kind="string", value="rwkv-world"),
        ],
    )


def _bpe(definition: dict[str, Any], *, name: str, bos_id: int, eos_id: int) -> Vocabulary:
    model = definition["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or definition.get("normalizer") is not None:
        raise GgufError(
            f"tokenizer {name!r}: is not byte-level BPE without a normalizer, so llama.cpp would give other ids; "
            f"export a .pth or a folder, or train with rwkv-world or a tokenizer of `{PROGRAM} train-tokenizer`"
        )
    pre = _splitting(definition.get("pre_tokenizer"), name)
    added = {token["id"]: token for token in definition.get("added_tokens", [])}
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}

    def kind(index: int) -> int:
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        return NORMAL if index in texts else UNUSED_TOKEN

    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        tokens=_filled({index: text.encode() for index, text in texts.items()}),
        types=[kind(index) for index in range(max(texts) + 1)],
        fields=[
            Field(key="tokenizer.ggml.model", kind="string", value="gpt2"),
            Field(key="tokenizer.ggml.pre", kind="string", value=pre),
            Field(key="tokenizer.ggml.merges", kind="string", value=merges),
            Field(key="tokenizer.ggml.bos_token_id", kind="uint32", value=bos_id),
            Field(key="tokenizer.ggml.eos_token_id", kind="uint32", value=eos_id),
            Field(key="tokenizer.ggml.add_bos_token", kind="bool", value=True),  # every document began with it
        ],
    )


def _splitting(pre_tokenizer: dict[str, Any] | None, name: str) -> str:
    """Return llama.cpp's name of the way in which words are split before BPE."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    kinds = [part.get("type") for part in parts]
    byte_level = parts[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    if byte_level and not byte_level.get("add_prefix_space"):
        if len(parts) == 1 and byte_level.get("use_regex", True):
            return "gpt-2"
        pattern = parts[0].get("pattern", {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and pattern == _LLAMA3_PATTERN and not byte_level.get("use_regex", True):
            return "llama-bpe"
    raise GgufError(
        f"tokenizer {name!r}: splits words by {', '.join(map(str, kinds)) or 'nothing'} with a pattern that is neither "
        "GPT-2's nor Llama 3's, so llama.cpp's ids may differ; export a .pth or a folder, and convert it there"
    )


def _filled(tokens: dict[int, bytes]) -> list[bytes]:
    return [tokens.get(index, f"[PAD{index}]".encode()) for index in range(max(tokens) + 1)]
