"""Conversion of tiktoken vocabularies, such as Llama 3's `tokenizer.model`, to the content of a tokenizer.json."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streaming_rwkv.tokenizers.base import TokenizerError, read_tokenizer_file
from streaming_rwkv.tokenizers.definition import byte_characters

# Llama 3's tiktoken file has only ranks; its pattern and special tokens are in Meta's llama-models.
_LLAMA3_RANKS = 128_000
# Every split of a token may become a merge. Llama 3 has twice as many tokens as RWKV World, whose longest has 128
# bytes, and all of them together 373,358.
_MOST_TOKEN_BYTES, _MOST_BYTES = 512, 1 << 21
LLAMA3_BOS, LLAMA3_EOS = "<|begin_of_text|>", "<|end_of_text|>"
_LLAMA3_SPECIAL = [
    LLAMA3_BOS,
    LLAMA3_EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *[f"<|reserved_special_token_{number}|>" for number in range(3, 248)],
]
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def read_tiktoken(file: Path) -> dict[bytes, int]:
    """Read the ranks in a tiktoken file: lines of `base64 rank`.

    Raises:
        TokenizerError: another kind of file, such as a SentencePiece `tokenizer.model`.
    """
    ranks: dict[bytes, int] = {}
    together = 0
    for number, line in enumerate(read_tokenizer_file(file).splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{file}:{number}: no tiktoken file (`base64 rank` lines); convert a SentencePiece model with "
                "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(folder) and give that folder"
            ) from None
        size = len(token)
        together += size
        if size > _MOST_TOKEN_BYTES or together > _MOST_BYTES:
            raise TokenizerError(
                f"{file}:{number}: found a token of {size:,} bytes, and {together:,} of all tokens so far, expected at "
                f"most {_MOST_TOKEN_BYTES} and {_MOST_BYTES:,}; copy the file again from its source"
            )
    return ranks


def llama3_definition(ranks: dict[bytes, int]) -> dict[str, Any]:
    """Convert Llama 3's tiktoken vocabulary to the content of a tokenizer.json with the same ids.

    Raises:
        TokenizerError: the number of ranks is not Llama 3's, so the pattern that splits words is unknown.
    """
    if len(ranks) != _LLAMA3_RANKS:
        raise TokenizerError(
            f"tokenizer.model: {len(ranks)} ranks, only Llama 3's with {_LLAMA3_RANKS} can be converted (the file does "
            "not say how to split words); give a folder with a tokenizer.json"
        )
    return tiktoken_definition(ranks, pattern=_LLAMA3_PATTERN, special=_LLAMA3_SPECIAL)


def tiktoken_definition(ranks: dict[bytes, int], *, pattern: str, special: Sequence[str]) -> dict[str, Any]:
    """Convert a tiktoken encoding to the content of a tokenizer.json with the same ids.

    tiktoken merges the adjacent pair whose *joined* bytes have the lowest rank; a BPE model merges the pair that
    comes first in its list. Listing every split of a token into two tokens, in the order of the tokens' ranks, is
    equivalent.
    """
    characters = byte_characters()
    spelled = {token: "".join([characters[byte] for byte in token]) for token in ranks}
    merges: list[list[str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[spelled[left], spelled[right]] for left, right in known]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": content, **plain} for index, content in enumerate(special, start=len(ranks))
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
