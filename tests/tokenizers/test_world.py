"""RWKV World's vocabulary, and vocabularies of that format that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streaming_rwkv.tokenizer import (
    WORLD_VOCABULARY,
    TokenizerError,
    WorldTokenizer,
    load_tokenizer,
)


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    loaded = load_tokenizer("rwkv-world")
    assert isinstance(loaded, WorldTokenizer)
    return loaded


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


def world_lines() -> list[str]:
    """Return the lines of a vocabulary of single bytes and two more tokens."""
    return [f"{byte + 1} {(chr(byte) if byte < 128 else bytes([byte]))!r} 1" for byte in range(256)] + [
        "257 'ab' 2",
        "258 '中' 3",
    ]


def write_world(folder: Path, lines: list[str]) -> Path:
    (folder / WORLD_VOCABULARY).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def test_a_world_vocabulary_of_ones_own_is_used(tmp_path):
    tokenizer = load_tokenizer(write_world(tmp_path, world_lines()))
    assert tokenizer.encode("aab中").tolist() == [98, 257, 258]
    assert tokenizer.encode_reference(["aab中"])[0].tolist() == [98, 257, 258]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 lines, and 256 of the 256 single bytes are not tokens"),
        (world_lines()[:100], r"100 lines, and 156 of the 256 single bytes are not tokens \(the first is 0x64\)"),
        (world_lines()[:97] + world_lines()[98:], r"1 of the 256 single bytes are not tokens \(the first is 0x61\)"),
        ([*world_lines(), "-1 'xyz' 3"], r":259: found \"-1 'xyz' 3\", expected an id from 1 to 65535"),
        ([*world_lines(), "0 'xyz' 3"], "expected an id from 1 to 65535"),
        ([*world_lines(), "65536 'xyz' 3"], "expected an id from 1 to 65535"),
        ([*world_lines(), "300 '' 0"], "expected a token of 1 to 1,024 bytes"),
        ([*world_lines(), f"300 '{'a' * 1025}' 1025"], "expected a token of 1 to 1,024 bytes"),
        (
            [*world_lines(), *[f"{1000 + n} '{n:04}{'a' * 1000}' 1004" for n in range(2000)]],
            r"its tokens have 2,\d+,\d+ bytes together, expected at most 1,048,576",
        ),
        ([*world_lines(), "257 'xyz' 3"], "expected an id of its own: 257 is b'ab' already"),
        ([*world_lines(), "300 'ab' 2"], "expected a token of its own: b'ab' is id 257 already"),
        ([*world_lines(), "300 " + "(" * 100_000 + " 3"], "expected `id repr length`"),
    ],
)
def test_a_world_vocabulary_by_which_not_every_text_can_be_written_is_refused(tmp_path, lines, message):
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(write_world(tmp_path, lines))


def test_a_world_vocabulary_that_the_fast_library_cannot_read(tmp_path):
    lines = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]  # as bytes, where BlinkDL's file has texts
    with pytest.raises(TokenizerError, match="pyrwkv_tokenizer cannot read it"):
        load_tokenizer(write_world(tmp_path, lines)).load()


def test_a_world_vocabulary_that_is_no_text_is_refused(tmp_path):
    (tmp_path / WORLD_VOCABULARY).write_bytes(b"1 '\xff' 1\n")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_world_vocabulary_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / WORLD_VOCABULARY).touch()
    os.truncate(tmp_path / WORLD_VOCABULARY, 1 << 40)  # a hole, which takes no room
    with pytest.raises(TokenizerError, match="found 1,099,511,627,776 bytes, expected a regular file of at most"):
        load_tokenizer(tmp_path)
