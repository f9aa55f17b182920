"""The interface of all tokenizers: ids, texts, special tokens, files."""

from __future__ import annotations

import base64
import json
import logging
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from streaming_rwkv.shards import TokenizerRecord
from streaming_rwkv.tokenizer import (
    RECORD_NAME,
    HuggingFaceTokenizer,
    TextError,
    TokenizerError,
    WorldTokenizer,
    load_tokenizer,
)
from streaming_rwkv.tokenizers import huggingface, time_limit
from streaming_rwkv.tokenizers.steps import check_steps

HARD_TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces\n\n\nand lines\r\n\ttabs ",
    "床前明月光，疑是地上霜。",
    "🎉👩‍👩‍👧 é e\u0301 \u202eright to left",
    "\x00\x01\x7f\ufeff\ufffd",
    "<|endoftext|> spelled out, <s>, </s>, <|begin_of_text|>",
]


def byte_level(vocab_size: int = 300, *, special: list[str] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"] if special is None else special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, 床前明月光 床前"] * 9, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    loaded = load_tokenizer(save(byte_level(), tmp_path_factory.mktemp("bpe"), eos_token="<|endoftext|>"))
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    loaded = load_tokenizer("rwkv-world")
    assert isinstance(loaded, WorldTokenizer)
    return loaded


@pytest.fixture(params=["hugging_face", "world"])
def tokenizer(request: pytest.FixtureRequest) -> HuggingFaceTokenizer | WorldTokenizer:
    loaded: HuggingFaceTokenizer | WorldTokenizer = request.getfixturevalue(request.param)
    return loaded


# --- both kinds ---


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_decode_to_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["hugging_face", "world"])
def test_any_text_survives_and_has_as_many_bytes_as_its_ids(kind, request):
    tokenizer = request.getfixturevalue(kind)

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()

    check()


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    batch = tokenizer.encode_batch(HARD_TEXTS)
    assert len(batch) == len(HARD_TEXTS)
    for index, text in enumerate(HARD_TEXTS):
        np.testing.assert_array_equal(batch[index], tokenizer.encode(text))


def test_no_texts_are_an_empty_batch(tokenizer):
    assert len(tokenizer.encode_batch([])) == 0


def test_fast_ids_equal_those_of_the_reference(tokenizer):
    batch = tokenizer.encode_batch(HARD_TEXTS)
    for index, ids in enumerate(tokenizer.encode_reference(HARD_TEXTS)):
        np.testing.assert_array_equal(batch[index], ids)


def test_bos_and_eos_have_no_text(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "hello"


def test_a_character_cut_in_two_shows_as_a_replacement(tokenizer):
    ids = tokenizer.encode("\x00é\x00\U000e0001")  # no token of either vocabulary holds all four last bytes
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")


def test_a_saved_folder_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.record() == tokenizer.record()
    assert isinstance(again.record(), TokenizerRecord)
    np.testing.assert_array_equal(again.encode("hello 床前"), tokenizer.encode("hello 床前"))


def test_a_folder_that_was_changed_after_saving_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(TokenizerError, match="changed after they were saved"):
        load_tokenizer(tmp_path)


def test_an_unreadable_record_names_itself(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / RECORD_NAME).write_text("{}")
    with pytest.raises(TokenizerError, match=r"record\.json: not a tokenizer record"):
        load_tokenizer(tmp_path)


# --- text as it comes ---


def sentencepiece(folder: Path) -> HuggingFaceTokenizer:
    """Create a tokenizer like Llama 2's: marked spaces, byte fallback, and a first space that is not text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁b", "中"]
    made = Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    loaded = load_tokenizer(save(made, folder, bos_token="<s>", eos_token="</s>"))
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


def wordpiece(folder: Path) -> HuggingFaceTokenizer:
    made = Tokenizer(
        models.WordPiece({"[UNK]": 0, "[SEP]": 1, "do": 2, "not": 3, "##lo": 4, ".": 5}, unk_token="[UNK]")
    )
    made.decoder = decoders.WordPiece()
    return load_tokenizer(save(made, folder, eos_token="[SEP]"))  # type: ignore[return-value]


def metaspace(folder: Path) -> HuggingFaceTokenizer:
    made = Tokenizer(models.Unigram([("</s>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("b", -1.0)], unk_id=0))
    made.decoder = decoders.Metaspace()
    return load_tokenizer(save(made, folder, eos_token="</s>"))  # type: ignore[return-value]


def suffixes(folder: Path) -> HuggingFaceTokenizer:
    made = Tokenizer(models.BPE({"[SEP]": 0, "a</w>": 1, "b": 2, "</w>": 3}, []))
    made.decoder = decoders.BPEDecoder()
    return load_tokenizer(save(made, folder, eos_token="[SEP]"))  # type: ignore[return-value]


def far_reaching(folder: Path) -> HuggingFaceTokenizer:
    made = Tokenizer(models.BPE({"[SEP]": 0, "a": 1, "b": 2, "ab": 3}, []))
    made.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("abab", "-")])
    return load_tokenizer(save(made, folder, eos_token="[SEP]"))  # type: ignore[return-value]


def no_decoder(folder: Path) -> HuggingFaceTokenizer:
    made = Tokenizer(models.BPE({"[SEP]": 0, "a": 1, "b": 2}, []))
    return load_tokenizer(save(made, folder, eos_token="[SEP]"))  # type: ignore[return-value]


@pytest.mark.parametrize("make", [sentencepiece, wordpiece, metaspace, suffixes, no_decoder])
def test_the_parts_of_a_stream_are_the_text(make, tmp_path):
    tokenizer = make(tmp_path)
    # Bytes of "中" (0xE4 0xB8 0xAD) among them, so that characters are completed, cut, and wrong.
    chosen = [id for id in (0, 1, 2, 3, 4, 5, 231, 187, 176, 259, 260, 261, 262, 263) if id < tokenizer.vocab_size]

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(chosen), max_size=12))
    def check(ids):
        parts = list(tokenizer.decode_stream(ids))
        assert "".join(parts) == tokenizer.decode(ids)
        assert all(parts)

    check()


def test_the_parts_of_bytes_are_the_text(tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(1, tokenizer.vocab_size - 7), max_size=12))
    def check(ids):
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)

    check()


def test_a_decoder_that_reaches_far_is_not_cut(tmp_path):
    tokenizer = far_reaching(tmp_path)
    assert "".join(tokenizer.decode_stream([1, 2, 2])) == "abb"
    assert tokenizer.decode([3, 3]) == "-"


def test_a_part_comes_as_soon_as_it_is_certain(tmp_path):
    tokenizer = sentencepiece(tmp_path)
    # "▁a", "中" as three bytes, "b": the bytes wait for what ends their run, since a fourth could make them invalid.
    assert list(tokenizer.decode_stream([260, 231, 187, 176, 261])) == ["a", "中", "b"]


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_stream_decodes_each_token_a_few_times_only(kind, tmp_path, hugging_face, monkeypatch):
    tokenizer = sentencepiece(tmp_path) if kind == "sentencepiece" else hugging_face
    ids = [259, 260, 261, 231, 187, 176] * 500 if kind == "sentencepiece" else list(range(1, 250)) * 12
    expected = tokenizer.decode(ids)
    decoded = 0
    right = HuggingFaceTokenizer.decode

    def counting(self, ids):
        nonlocal decoded
        decoded += len(ids)
        return right(self, ids)

    monkeypatch.setattr(HuggingFaceTokenizer, "decode", counting)
    assert "".join(tokenizer.decode_stream(ids)) == expected
    assert decoded <= 8 * len(ids)


# --- Hugging Face ---


def test_bos_is_eos_where_there_is_none(hugging_face):
    assert hugging_face.bos_id == hugging_face.eos_id == 0


def test_bos_and_eos_come_from_the_files_or_the_caller(tmp_path):
    folder = save(byte_level(special=["<s>", "</s>", "<x>"]), tmp_path, bos_token="<s>", eos_token={"content": "</s>"})
    assert (load_tokenizer(folder).bos_id, load_tokenizer(folder).eos_id) == (0, 1)
    assert load_tokenizer(folder, eos_token="<x>").eos_id == 2


def test_without_an_eos_the_error_says_what_to_do(tmp_path):
    folder = save(byte_level(), tmp_path)
    with pytest.raises(TokenizerError, match=r"no end-of-text token.*`eos_token:`.*<\|endoftext\|>"):
        load_tokenizer(folder)


def test_an_eos_that_the_vocabulary_lacks_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"eos_token '</s>' is not in its vocabulary"):
        load_tokenizer(save(byte_level(), tmp_path, eos_token="</s>"))


def test_a_plain_tokenizer_json_is_enough(tmp_path):
    folder = save(byte_level(), tmp_path, eos_token="<|endoftext|>")
    assert load_tokenizer(folder / "tokenizer.json").record().sha256 == load_tokenizer(folder).sha256


def test_a_text_that_spells_eos_out_gets_ordinary_ids(hugging_face):
    ids = hugging_face.encode("a<|endoftext|>b")
    assert hugging_face.eos_id not in ids.tolist()
    assert hugging_face.decode(ids) == "a<|endoftext|>b"


def test_an_eos_that_is_not_marked_special_is_made_so(tmp_path):
    made = byte_level(special=[])
    made.add_tokens([AddedToken("<end>", normalized=False)])
    tokenizer = load_tokenizer(save(made, tmp_path, eos_token="<end>"))
    assert tokenizer.eos_id not in tokenizer.encode("a<end>b").tolist()


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=9)
    tokenizer = load_tokenizer(save(made, tmp_path, eos_token="<|endoftext|>"))
    assert tokenizer.decode(tokenizer.encode("hello world, all of it")) == "hello world, all of it"


def test_the_saved_folder_loads_with_transformers(hugging_face, tmp_path):
    from transformers import AutoTokenizer

    hugging_face.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello 床前明月光"
    assert theirs.encode(text, add_special_tokens=False) == hugging_face.encode(text).tolist()
    assert theirs.eos_token_id == hugging_face.eos_id


def test_a_definition_that_fastokens_lacks_is_encoded_by_the_reference_with_a_warning(tmp_path, caplog):
    """WordPiece: a normalizer changes the text, and bytes are divided in proportion."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "hel": 2, "##lo": 3}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece()
    tokenizer = load_tokenizer(save(made, tmp_path, eos_token="[SEP]"))
    with caplog.at_level(logging.WARNING):
        tokenizer.load()
    assert tokenizer.encode("Hello").tolist() == [2, 3]
    assert tokenizer.decode([2, 3, 1]) == "hello"
    assert tokenizer.token_bytes[[1, 2, 3]].tolist() == [0, 3, 2]
    supported = "fastokens does not support it" not in caplog.text
    assert not supported, "fastokens learned WordPiece: choose another model for this test"


def test_sentencepiece_marks_and_bytes_count_as_the_text_that_they_encode(tmp_path):
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁he", -1.0), ("llo", -1.0), ("<0xE5>", -9.0)]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    tokenizer = load_tokenizer(save(made, tmp_path, eos_token="</s>"))
    assert tokenizer.encode(" hello").tolist() == [2, 3]
    assert tokenizer.decode([2, 3]) == " hello"
    assert tokenizer.token_bytes.tolist() == [5, 0, 3, 3, 1]


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no Hugging Face tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {}}}', "its vocabulary is empty"),
    ],
)
def test_an_unreadable_tokenizer_json_names_itself(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: {message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[]", "3", '"</s>"', "null", "{", "[" * 5000])
def test_malformed_files_beside_a_tokenizer_name_themselves(tmp_path, name, content):
    save(byte_level(), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(tmp_path, eos_token="</s>")


def test_a_text_that_a_library_cannot_encode_is_an_error_of_the_text(tmp_path):
    """WordPiece needs its token for unknown words, which the vocabulary does not have."""
    made = Tokenizer(models.WordPiece({"[SEP]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = load_tokenizer(save(made, tmp_path, eos_token="[SEP]"))
    with pytest.raises(TextError, match=r"a text cannot be encoded: .*\[UNK\]"):
        tokenizer.encode_batch(["b"])


@pytest.mark.parametrize("text", ["", "b", "one two"])
def test_a_panic_while_a_text_is_encoded_is_an_error_of_the_text(tmp_path, text):
    made = byte_level()
    made.normalizer = normalizers.Replace("", "aa")  # tokenizers slices outside of the text
    tokenizer = load_tokenizer(save(made, tmp_path, eos_token="<|endoftext|>"))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_reference([text])):
        with suppress(TextError):  # nothing else is raised, of whatever base
            encode(text)


def in_sequence(steps: list[dict[str, Any]], members: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", members: steps}


def replacement(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
GROWING = {
    "replacement": {"normalizer": replacement({"String": "e"}, "e" * 100_000)},
    "prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}},
    "many": {"normalizer": in_sequence([in_sequence([replacement({"String": "e"}, "ee")] * 7)])},
    "bytes": {"normalizer": in_sequence([{"type": "ByteLevel"}] * 30)},
    "empty text": {"normalizer": in_sequence([replacement({"String": ""}, "a")] * 90)},
    "empty expression": {"normalizer": in_sequence([replacement({"Regex": "(?=.)"}, "a")] * 90)},
    "decomposed": {"normalizer": in_sequence([replacement({"String": "e"}, "\ufdfa"), {"type": "NFKD"}] * 2)},
    "not a sequence": {"normalizer": replacement({"Regex": "."}, "x" * 1000) | {"normalizers": []}},
    "bytes of bytes": {"pre_tokenizer": in_sequence([BYTES | {"pretokenizers": []}] * 40, "pretokenizers")},
    "of both parts": {
        "normalizer": replacement({"String": "e"}, "e" * 33),
        "pre_tokenizer": in_sequence([{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}, BYTES],
                                     "pretokenizers"),
    },
    "copies": {
        "post_processor": {"type": "TemplateProcessing", "single": [TEXT] * 99, "pair": [], "special_tokens": {}},
    },
    "suffix": {"decoder": in_sequence([{"type": "BPEDecoder", "suffix": ""}] * 60, "decoders")},
    "delimiter": {
        "decoder": in_sequence([{"type": "CTC", "pad_token": "x", "word_delimiter_token": "", "cleanup": True}] * 60,
                               "decoders")
    },
    "decoder": {"decoder": in_sequence([replacement({"Regex": "."}, "x" * 1000) | {"decoders": []}], "decoders")},
}  # fmt: skip


@pytest.mark.parametrize("parts", GROWING.values(), ids=GROWING)
def test_a_tokenizer_that_makes_a_text_endlessly_long_is_refused(tmp_path, parts):
    folder = save(byte_level(), tmp_path, eos_token="<|endoftext|>")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | parts))
    with pytest.raises(
        TokenizerError, match=rf"{[*parts][-1]}: it may make a text [\d.e+]+ times as long, expected at most"
    ):
        load_tokenizer(folder)


USED = {
    "Llama 2": [{"type": "Prepend", "prepend": "\u2581"}, replacement({"String": " "}, "\u2581")],
    "ALBERT": [
        replacement({"String": "``"}, '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
        replacement({"Regex": " {2,}"}, " "),
    ],
    "BERT": [{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
              "lowercase": True}],
}  # fmt: skip


@pytest.mark.parametrize("steps", USED.values(), ids=USED)
def test_the_steps_of_tokenizers_in_use_are_taken(steps):
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    check_steps({"normalizer": in_sequence(steps), "pre_tokenizer": metaspace}, where="tokenizer.json")


@pytest.mark.parametrize(
    "table",
    [
        b"",
        struct.pack("<I", 4) + b"\xff" * 4 + b"abc",
        struct.pack("<I", 2**31) + b"\xff" * 4 + b"abc",
        struct.pack("<I", 4) + bytes(4) + b"x" * 1000 + b"\0",
    ],
    ids=["empty", "damaged", "short", "long"],
)
def test_a_table_of_characters_is_checked(table):
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    with pytest.raises(
        TokenizerError, match=r"normalizer\.precompiled_charsmap: found .*, expected SentencePiece's table"
    ):
        check_steps({"normalizer": step}, where="tokenizer.json")


@pytest.mark.parametrize(
    "step",
    [
        {"prepend": "x" * 1000}, {"type": "Sequence"}, {"type": "Sequence", "normalizers": {}}, "NFC", 7,
        {"type": "Sequence", "normalizers": [None]}, {"type": "Metaspace"}, {"type": ["NFC"]},
        {"type": "Replace", "content": "x"}, {"type": "Replace", "pattern": {"String": 5}, "content": "x"},
        {"type": "Prepend", "prepend": ["x"]},
    ],
)  # fmt: skip
def test_a_step_of_no_known_kind_is_named(step):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: normalizer[^:]*: found .*, expected "):
        check_steps({"normalizer": step}, where="tokenizer.json")


@pytest.mark.parametrize("length", [0, -1, True, "5", None])
def test_pieces_without_a_length_are_refused(length):
    with pytest.raises(TokenizerError, match=r"pre_tokenizer\.length: found .*, expected a number from 1 on"):
        check_steps({"pre_tokenizer": {"type": "FixedLength", "length": length}}, where="tokenizer.json")


def test_a_tokenizer_of_thousands_of_steps_is_refused(tmp_path):
    made = byte_level()
    made.normalizer = normalizers.Sequence([normalizers.NFKD()] * 3000)
    with pytest.raises(TokenizerError, match="normalizer: has 3,000 steps, expected at most 100; choose another"):
        load_tokenizer(save(made, tmp_path, eos_token="<|endoftext|>"))


def test_more_than_one_table_of_characters_is_refused():
    step = {"type": "Precompiled", "precompiled_charsmap": ""}
    with pytest.raises(TokenizerError, match="normalizer: has more than one Precompiled step"):
        check_steps({"normalizer": {"type": "Sequence", "normalizers": [step, step]}}, where="tokenizer.json")


def test_an_added_token_of_megabytes_is_refused(tmp_path):
    folder = save(byte_level(), tmp_path, eos_token="<|endoftext|>")
    file = folder / "tokenizer.json"
    made = json.loads(file.read_bytes())
    made["added_tokens"].append({"id": 300, "content": "a" * 5_000_000, "normalized": True})
    file.write_text(json.dumps(made))
    with pytest.raises(
        TokenizerError, match=r"added_tokens\[1\]\.id: found '5,000,000 characters', expected at most 4,096 bytes"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("ids", [[10**6], [5, -1], np.array([1 << 31])])
def test_ids_outside_of_the_vocabulary_have_no_text(hugging_face, ids):
    for tokenizer in (hugging_face, load_tokenizer("rwkv-world")):
        with pytest.raises(TokenizerError, match=r"found ids from .* to .*, expected 0 to \d+"):
            tokenizer.decode(ids)
    assert hugging_face.decode([]) == ""


def test_a_limit_that_is_reached_while_a_text_is_encoded_is_not_the_texts_fault(tmp_path):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path, eos_token="<|endoftext|>"))

    class Reference:
        def encode_batch_fast(self, texts, *, add_special_tokens):
            raise MemoryError

    tokenizer._reference = Reference()
    with pytest.raises(MemoryError):
        tokenizer.encode("one")


def test_a_tokenizer_that_no_library_can_make_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nope", "vocab": {"</s>": 0}}}')
    tokenizer = load_tokenizer(tmp_path, eos_token="</s>")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: Hugging Face tokenizers [\d.]+ cannot read it"):
        tokenizer.load()


def test_a_call_that_does_not_return_is_given_up(monkeypatch):
    monkeypatch.setattr(time_limit, "LEAST_SECONDS", 0.01)
    returns = Event()
    with pytest.raises(time_limit.TimeIsOver, match="no end after 0 s for 5 characters; its regular expressions may"):
        time_limit.within_limit(returns.wait, characters=5)
    returns.set()


def test_a_search_without_an_end_is_no_fault_of_one_text(hugging_face, tmp_path, monkeypatch):
    def never(call, *, characters):
        raise time_limit.TimeIsOver(f"no end for {characters} characters")

    monkeypatch.setattr(huggingface, "within_limit", never)
    whole = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    reference = load_tokenizer(save(whole, tmp_path / "t", eos_token="</s>"))
    calls = [
        lambda: hugging_face.encode_batch(["ab"]),
        lambda: hugging_face.encode("ab"),
        lambda: reference.decode([0]),
    ]
    for call in calls:
        with pytest.raises(TokenizerError, match=r"no end for \d+ characters; choose another tokenizer") as raised:
            call()
        assert not isinstance(raised.value, TextError)  # or each text would be tried by itself


def test_a_call_within_its_time_returns_or_raises_what_it_raises():
    assert time_limit.within_limit(lambda: 5, characters=0) == 5
    with pytest.raises(ZeroDivisionError):
        time_limit.within_limit(lambda: 1 // 0, characters=0)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_search_of_added_tokens_without_an_end_is_given_up(normalized, tmp_path, monkeypatch):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace(Regex("a*a*(?!a|!|$)"), "b")
    tokenizer.add_tokens([AddedToken("aaa!", normalized=normalized)])
    folder = save(tokenizer, tmp_path / "t", eos_token="<|endoftext|>")
    tried = []

    def never(*_, **__):
        tried.append(1)
        raise subprocess.TimeoutExpired("python", 120)

    assert load_tokenizer(folder).encode("aaa!").size  # it ends here
    monkeypatch.setattr(subprocess, "run", never)
    if normalized:
        message = (
            r"tokenizer\.json: no end after 120 s of reading it; its regular expressions may backtrack indefinitely in"
        )
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(folder)
    else:
        load_tokenizer(folder)
    assert bool(tried) == normalized


def test_a_definition_that_is_too_deep_to_be_written_is_refused(tmp_path):
    folder = save(byte_level(), tmp_path / "t", eos_token="<|endoftext|>")
    definition = json.loads((folder / "tokenizer.json").read_bytes())
    for _ in range(300):
        definition["normalizer"] = {"type": "Sequence", "normalizers": [definition["normalizer"] or {"type": "NFC"}]}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=r"tokenizer.json: cannot be written again \(Recursion limit reached\)"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_says_what_it_looked_for(tmp_path):
    with pytest.raises(TokenizerError, match=r"found no tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_missing_path_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(TokenizerError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_hub_names_come_from_the_cache_and_its_absence_is_explained(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    save(byte_level(), snapshot, eos_token="<|endoftext|>")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    program = """
from streaming_rwkv.tokenizer import TokenizerError, load_tokenizer
print(load_tokenizer("some/model").record().name)
for name in ("some/other", "tok"):
    try:
        load_tokenizer(name)
    except TokenizerError as error:
        print(error)
"""
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=250
    )
    name, error, local_error = done.stdout.splitlines()
    assert name == "some/model"
    assert error.startswith("tokenizer 'some/other': not a local folder, and the Hugging Face hub does not provide it")
    assert "huggingface-cli login" in error
    assert local_error.startswith(f"tokenizer 'tok': no such folder in {Path.cwd()}, and the Hugging Face hub does not")
    assert "train-tokenizer RECIPE --vocab-size N --to tok" in local_error


def test_code_of_a_hub_repository_is_neither_run_nor_asked_about(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("a" * 40)
    code = {"AutoTokenizer": ["code.Tok", None]}
    config = {"tokenizer_class": "Tok", "auto_map": code, "eos_token": "x"}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(config))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}))
    (snapshot / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: ...\nclass Config: ...\n")
    program = """
from streaming_rwkv.tokenizer import TokenizerError, load_tokenizer
try:
    load_tokenizer("some/model")
except TokenizerError as error:
    print(error)
"""
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, input="y\ny\ny\n", capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "tokenizer 'some/model': the hub has no tokenizer.json for it, and transformers cannot convert what it has "
        "without running its own code, which is never done; choose another, or give a folder with a tokenizer.json\n"
    )
    assert not (tmp_path / "ran").exists()
    assert "trust_remote_code" not in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", RECORD_NAME])
def test_a_file_that_is_too_large_is_not_read(tmp_path, name):
    if name not in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "tokenizer.json").write_text("{}")
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(TokenizerError, match=f"{name}: found 1,073,741,825 bytes, expected a regular file of at most"):
        load_tokenizer(tmp_path)


def test_a_device_is_refused_as_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(TokenizerError, match=r"found no tokenizer\.json"):
        load_tokenizer(tmp_path)
