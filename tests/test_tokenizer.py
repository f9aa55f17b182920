"""The face of all tokenizers: ids, texts, special tokens, files."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from streaming_rwkv.shards import TokenizerRecord
from streaming_rwkv.tokenizer import (
    RECORD_NAME,
    WORLD_VOCABULARY,
    HuggingFaceTokenizer,
    WorldTokenizer,
    load_tokenizer,
)
from streaming_rwkv.tokenizer_json import TokenizerError, llama3_definition, read_tiktoken, tiktoken_definition

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


def test_fast_ids_are_the_references(tokenizer):
    batch = tokenizer.encode_batch(HARD_TEXTS)
    for index, ids in enumerate(tokenizer.encode_reference(HARD_TEXTS)):
        np.testing.assert_array_equal(batch[index], ids)


def test_bos_and_eos_stand_for_no_text(tokenizer):
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


# --- RWKV World ---


def test_world_is_blinkdls_vocabulary(world):
    assert (world.kind, world.vocab_size, world.bos_id, world.eos_id) == ("rwkv-world", 65536, 0, 0)
    # The ids that BlinkDL's own tokenizer gives for this sentence, from its README.
    sentence = "Today is a beautiful day. 今天是美好的一天。"
    ids = [33520, 4600, 332, 59219, 21509, 47, 33, 10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080]
    assert world.encode(sentence).tolist() == ids


def test_world_bytes_are_the_ids_after_zero(world):
    assert world.encode("\x00\x01a").tolist() == [1, 2, 98]


def test_a_broken_world_vocabulary_names_the_line(tmp_path):
    (tmp_path / WORLD_VOCABULARY).write_text("1 'a' 1\n2 'bc' 7\n")
    with pytest.raises(TokenizerError, match=r":2: found \"2 'bc' 7\", expected `id repr length`"):
        load_tokenizer(tmp_path).load()


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


def test_what_fastokens_lacks_falls_back_and_says_so(tmp_path, caplog):
    """WordPiece: a normalizer changes the text, and bytes are shared out in proportion."""
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


def test_sentencepiece_marks_and_bytes_count_as_the_text_they_stand_for(tmp_path):
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


def test_a_tokenizer_that_no_library_can_make_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nope", "vocab": {"</s>": 0}}}')
    tokenizer = load_tokenizer(tmp_path, eos_token="</s>")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: Hugging Face tokenizers [\d.]+ cannot read it"):
        tokenizer.load()


def test_a_folder_without_a_tokenizer_says_what_it_looked_for(tmp_path):
    with pytest.raises(TokenizerError, match=r"found no tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_path_that_is_not_there_is_no_hub_name(tmp_path):
    with pytest.raises(TokenizerError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_hub_names_come_from_the_cache_and_its_absence_is_explained(tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    save(byte_level(), snapshot, eos_token="<|endoftext|>")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    program = """
from streaming_rwkv.tokenizer import load_tokenizer
from streaming_rwkv.tokenizer_json import TokenizerError
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
    assert error.startswith("tokenizer 'some/other': neither a local folder nor to be had from the Hugging Face hub")
    assert "huggingface-cli login" in error
    assert local_error.startswith(f"tokenizer 'tok': no such folder in {Path.cwd()}, nor to be had from")
    assert "train-tokenizer RECIPE --vocab-size N --to tok" in local_error


# --- tiktoken files ---


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
