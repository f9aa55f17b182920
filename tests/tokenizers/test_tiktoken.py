"""tiktoken vocabularies are converted to definitions with the same ids."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_rwkv.tokenizer import (
    HuggingFaceTokenizer,
    TokenizerError,
    load_tokenizer,
)
from streaming_rwkv.tokenizers.tiktoken import llama3_definition, read_tiktoken, tiktoken_definition


def naive_tiktoken(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's definition: join the adjacent pair of the lowest rank until there is none."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_a_converted_tiktoken_vocabulary_gives_tiktokens_ids(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"ab", b"bc", b"abc", b"cd", b"abcd", b"aab", b"dd", "月".encode()[:2], "月".encode()):
        ranks[token] = len(ranks)
    definition = tiktoken_definition(ranks, pattern=r"\S+|\s+", special=["<eos>"])
    tokenizer = HuggingFaceTokenizer(definition, name="t", bos_token=None, eos_token="<eos>", where="t")

    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet="abcd月", max_size=12))
    def check(word):
        whole = [ranks[word.encode()]] if word.encode() in ranks else naive_tiktoken(word.encode(), ranks)
        assert tokenizer.encode(word).tolist() == (whole if word else [])
        assert tokenizer.encode_reference([word])[0].tolist() == (whole if word else [])

    check()
    assert tokenizer.eos_id == len(ranks)


def test_a_tiktoken_file_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYmM= 1\n")
    assert read_tiktoken(tmp_path / "tokenizer.model") == {b"a": 0, b"bc": 1}


def test_a_sentencepiece_model_is_told_apart(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model:\d: no tiktoken file.*SentencePiece"):
        load_tokenizer(tmp_path)


def test_only_llama3s_number_of_ranks_is_converted():
    with pytest.raises(TokenizerError, match="256 ranks, only Llama 3's with 128000"):
        llama3_definition({bytes([byte]): byte for byte in range(256)})


def test_tokens_of_which_the_merges_would_not_fit_are_refused(tmp_path):
    file = tmp_path / "tokenizer.model"
    for size, count, line in ((520, 1, 1), (510, 5000, 4113)):
        token = base64.b64encode(b"a" * size).decode()
        file.write_text("".join(f"{token} {rank}\n" for rank in range(count)))
        with pytest.raises(TokenizerError, match=rf"tokenizer\.model:{line}: found a token of {size} bytes, and "):
            read_tiktoken(file)
