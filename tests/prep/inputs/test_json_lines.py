"""JSON lines and JSON arrays: whole, odd and broken files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import numpy as np
import pytest
import zstandard

from prep.config import SourceConfig
from prep.inputs import json_lines
from prep.inputs.faults import InputError
from prep.inputs.readers import read_part, read_unit
from prep.inputs.units import plan_units
from streaming_rwkv.config import UserError
from tests.prep.inputs.reading import BAD_BYTE, HALF_EMOJI, lines, read


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.json.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("a.ndjson", bytes),
        ("a.jsonlines", bytes),
        ("A.JSONL", bytes),
        ("a.Json", bytes),
        ("a.jsonl.GZ", gzip.compress),
        ("a.NDJSON.Zst", zstandard.ZstdCompressor().compress),
        ("a.jsonl.xz", lzma.compress),
        ("a.json.XZ", lzma.compress),
        ("a.jsonlines.bz2", bz2.compress),
    ],
)
def test_json_lines_in_every_wrapping(tmp_path, name, compress):
    (tmp_path / name).write_bytes(compress(lines("one", "二", "")))
    assert read(tmp_path / name) == ([(0, "one"), (1, "二"), (2, "")], [])


@pytest.mark.parametrize("wrap", [bytes, gzip.compress])
def test_a_json_file_may_be_one_array(tmp_path, wrap):
    name = "a.json" if wrap is bytes else "a.json.gz"
    content = b' \n[{"text": "one"}, 5, {"text": "two"}, {"other": 1}]\n'
    (tmp_path / name).write_bytes(wrap(content))
    assert read(tmp_path / name) == ([(0, "one"), (2, "two")], [(1, "not a JSON object"), (3, "no 'text'")])


def test_two_gzip_members_are_one_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("one")) + gzip.compress(lines("two")))
    assert read(tmp_path / "a.jsonl.gz")[0] == [(0, "one"), (1, "two")]


def test_two_zstd_frames_are_one_file(tmp_path):
    frames = [zstandard.ZstdCompressor().compress(lines(text)) for text in ("one", "two")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.zst")[0] == [(0, "one"), (1, "two")]


def test_rows_are_lines_from_zero_and_blank_ones_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n   \n{"text": "two"}')
    assert read(tmp_path / "a.jsonl") == ([(1, "one"), (3, "two")], [])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("one"))
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf[{"text": "two"}]')
    assert read(tmp_path) == ([(0, "one"), (0, "two")], [])


def test_every_kind_of_broken_line_has_its_reason(tmp_path):
    content = [
        b'{"text": "fine"}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "cut of',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": {"nested": "text"}}',
        b'{"text": ["a"]}',
        b'{"body": "x"}',
        b'["text"]',
        b'"text"',
        b"null",
        b'{"text": "\\ud800"}',
        b'{"text": "fine too"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    texts, rejections = read(tmp_path / "a.jsonl")
    assert texts == [(0, "fine"), (12, "fine too")]
    assert rejections == [
        (1, "invalid UTF-8"),
        (2, "invalid JSON"),
        (3, "'text' is null"),
        (4, "'text' is not a string"),
        (5, "'text' is not a string"),
        (6, "'text' is not a string"),
        (7, "no 'text'"),
        (8, "not a JSON object"),
        (9, "not a JSON object"),
        (10, "not a JSON object"),
        (11, "invalid JSON"),
    ]


def test_an_empty_file_has_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.json").write_bytes(b"[]")
    assert read(tmp_path) == ([], [])


def test_a_line_of_fifty_megabytes_is_read(tmp_path):
    text = "word " * 10_000_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("before", text, "after"), compresslevel=1))
    assert read(tmp_path / "a.jsonl.gz") == ([(0, "before"), (1, text), (2, "after")], [])


def test_another_key_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "one", "text": 5}\n')
    assert read(tmp_path / "a.jsonl", text="content") == ([(0, "one")], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(lines("x" * 99), mtime=0)[:-30], "broken gzip .*; download it again"),
        ("a.jsonl.gz", b"no gzip at all, but long enough to hold a header", "broken gzip"),
        ("a.jsonl.gz", gzip.compress(lines("x"), mtime=0)[:-6] + b"abcdef", "broken gzip"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(lines("x" * 99))[:-3], "broken zstd .ends within a frame"),
        ("a.jsonl.zst", b"no zstd", "broken zstd"),
        ("a.jsonl.xz", lzma.compress(lines("x" * 99))[:-3], "broken xz"),
        ("a.jsonl.bz2", bz2.compress(lines("x" * 99))[:-3], "broken bzip2"),
        ("a.jsonl.bz2", b"no bzip2", "broken bzip2"),
        ("a.jsonl.XZ", b"", "is empty"),
        ("a.jsonl.gz", b"", "is empty, which no compressed file is; download it again"),
        ("a.json.zst", b"", "is empty"),
        ("a.json", b'[{"text": "one"},', "begins with '\\[' but is not a JSON array"),
        ("a.parquet", b"PAR1 not really PAR1", "cannot be read as parquet .*; download it again"),
        ("a.parquet", b"", "cannot be read as parquet"),
    ],
)
def test_a_broken_file_stops_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    expected = message if "zstd .ends" not in message else r"broken zstd \(it ends within a frame\)"
    with pytest.raises(InputError, match=rf"{name}: {expected}"):
        read(tmp_path / name)


@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_documents_without_the_key_are_rejected_however_many_are_adjacent(tmp_path, unit_bytes):
    (tmp_path / "a.jsonl").write_bytes(lines("one") + b'{"body": "x"}\n' * 3)
    (tmp_path / "b.json").write_bytes(b'{"error": "404"}')
    missing = [(1, "no 'text'"), (2, "no 'text'"), (3, "no 'text'"), (0, "no 'text'")]
    assert read(tmp_path, unit_bytes=unit_bytes) == ([(0, "one")], missing)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", LFS_POINTER, "it is a Git LFS pointer: fetch the file itself with `git lfs pull`"),
        ("a.jsonl", b"\n" + '{"text": "one"}\n'.encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a.json.gz", gzip.compress('{"text": "one"}\n'.encode("utf-16-le")), "it is UTF-16"),
        ("a.jsonl", '{"text": "one"}\n'.encode("utf-16-be"), "it is UTF-16"),
        (
            "a.json",
            json.dumps({"text": "one"}, indent=1).encode(),
            "an object that spans several lines: write one object",
        ),
        ("a.json", b'{"text": "one",\n "url": "u"}', "an object that spans several lines"),
        (
            "a.jsonl",
            b"<!DOCTYPE html>\n<title>404</title>",
            "it begins with '<!DOCTYPE html>': write one object per line",
        ),
        ("a.jsonl", (lines("x" * 99)[:80] + b"\n") * 2, 'it begins with \'{"text": "xxx'),
    ],
    ids=["LFS", "UTF-16", "UTF-16 LE", "UTF-16 BE", "indented", "two lines", "HTML", "cut off"],
)
def test_a_file_without_an_object_stops_the_build_and_is_described(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert f"{name}: no line of it is a JSON object; " in str(caught.value)
    assert what in str(caught.value)


def test_utf16_is_told_from_a_part_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n'.encode("utf-16") * 99)
    with pytest.raises(InputError, match=r"a\.jsonl: no line of it is a JSON object; it is UTF-16"):
        read(tmp_path, unit_bytes=100)


def test_a_broken_document_in_a_file_of_its_own_is_rejected(tmp_path):
    (tmp_path / "a.json").write_bytes(lines("x" * 99)[:80])
    (tmp_path / "b.json").write_bytes(lines("two"))
    assert read(tmp_path) == ([(0, "two")], [(0, "invalid JSON")])


def test_a_file_of_lines_may_be_broken_in_half_of_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{\n"text"\n' + lines("one", "two"))
    (tmp_path / "b.jsonl").write_bytes(b"\n \n")
    assert read(tmp_path) == ([(2, "one"), (3, "two")], [(0, "invalid JSON"), (1, "not a JSON object")])


def test_nan_and_infinity_as_python_writes_them_are_read(tmp_path):
    records = [{"text": f"x{number}", "score": number} for number in (float("nan"), float("inf"), -float("inf"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.json").write_text(json.dumps(records[:1]))
    broken = [b'{"text": "\\ud800", "score": NaN}', b'{"text": NaN}', b'{"score": NaN', b'{"a":' * 5000]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([*broken, b'{"text": "\\ud83c\\udf89", "score": NaN}']))
    assert read(tmp_path) == (
        [(0, "xnan"), (1, "xinf"), (2, "x-inf"), (0, "xnan"), (4, "🎉")],
        [(0, "invalid JSON"), (1, "'text' is not a string"), (2, "invalid JSON"), (3, "invalid JSON")],
    )


MANY_DIGITS = b'{"text": "%b", "number": ' + b"1" * 5000 + b"}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_only_values_that_are_used_can_reject_a_document(tmp_path, name):
    records = [
        HALF_EMOJI % b"one",
        BAD_BYTE % b"two",
        MANY_DIGITS % b"three",
        b'{"text": "four", "deep": {"a": "\xff"}}',
    ]
    broken = [HALF_EMOJI % b"\\ud83d", BAD_BYTE % b"\xff", BAD_BYTE % "\N{MAN}".encode()[:-1]]
    content = b"\n".join(records + broken) if name == "a.jsonl" else b"[" + b", ".join(records + broken) + b"]"
    (tmp_path / name).write_bytes(content)
    texts, rejections = read(tmp_path / name)
    assert texts == [(0, "one"), (1, "two"), (2, "three"), (3, "four")]
    # An array is not split into lines, so its bytes are judged together.
    assert rejections == [
        (4, "invalid JSON" if name == "a.jsonl" else "invalid UTF-8"),
        (5, "invalid UTF-8"),
        (6, "invalid UTF-8"),
    ]


def test_a_key_that_is_not_used_may_be_the_text_of_another_source(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(HALF_EMOJI % b"one")
    assert read(tmp_path, text="title") == ([], [(0, "invalid JSON")])


@pytest.mark.parametrize("unit_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize(("name", "compress"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)])
def test_a_line_that_is_too_long_is_rejected_however_it_is_cut(tmp_path, monkeypatch, name, compress, unit_bytes):
    monkeypatch.setattr(json_lines, "_MOST_LINE_BYTES", 100)
    monkeypatch.setattr(json_lines, "_READ_BYTES", 64)
    fits, too_long = "x" * (100 - len(lines("")) + 1), "x" * (101 - len(lines("")) + 1)
    spaces = lines("five")[:-1] + b" " * 100 + b"\n"
    content = lines("one", fits, too_long, "three", "y" * 5000) + spaces + lines("last", "z" * 5000)[:-3]
    (tmp_path / name).write_bytes(compress(content))
    assert read(tmp_path / name, unit_bytes=unit_bytes) == (
        [(0, "one"), (1, fits), (3, "three"), (6, "last")],
        [(row, "line longer than 256 MiB") for row in (2, 4, 5, 7)],
    )


def test_a_line_that_is_too_long_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_MOST_LINE_BYTES", 1 << 20)
    content = b'{"text": "' + b"x" * (100 << 20) + b'"}\n' + lines("after")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, compresslevel=1))
    del content
    tracemalloc.start()
    try:
        assert read(tmp_path / "a.jsonl.gz") == ([(1, "after")], [(0, "line longer than 256 MiB")])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20  # the limit joined and some blocks of 1 MiB, of a line of 100 MiB


def test_lines_of_a_large_block_are_divided_in_parts():
    block = b"\n" * (3 << 20) + b"x"  # as four bytes of zstd may become 128 KiB
    lengths = [len(lines) for lines in json_lines._lines(iter([block]))]
    assert sum(lengths) == (3 << 20) + 1
    assert max(lengths) <= 1 << 20


def test_an_array_that_is_too_long_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_MOST_ARRAY_BYTES", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * (3 << 20) + b"]"))
    with pytest.raises(
        InputError, match=r"a\.json\.gz: is one JSON array of more than 1 MiB, .* write one object per line"
    ):
        read(tmp_path / "a.json.gz")


def test_many_small_zstd_frames_and_a_large_one_are_read(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    large = np.random.default_rng(1).bytes(2_000_000).hex()
    small = [compress(lines(str(number))) for number in range(30_000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([*small, compress(lines(large)), *small]))
    texts = [text for _, text in read(tmp_path / "a.jsonl.zst")[0]]
    numbers = [str(number) for number in range(30_000)]
    assert texts == [*numbers, large, *numbers]


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*["x" * 1000] * 3000))
    source = SourceConfig(paths=[str(file)])
    (unit,) = plan_units({"s": source}, unit_bytes=1 << 24)
    reading = read_part(unit.parts[0], source)
    next(reading)
    os.truncate(file, 2_000_000)
    with pytest.raises(InputError, match=r"a\.jsonl: is \d+ bytes shorter than when it was listed"):
        list(reading)
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since it was listed"):
        list(read_part(unit.parts[0], source))


def test_a_large_array_with_rejections_takes_bounded_memory(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 5000}] * 3000))
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress((b"{}" + b" " * 60 + b"\n") * 400_000 + lines("x"), compresslevel=1, mtime=0)
    )
    for name in ("a.json", "b.jsonl.gz"):
        source = SourceConfig(paths=[str(tmp_path / name)])
        chunks = [chunk for unit in plan_units({"s": source}, unit_bytes=1 << 20) for chunk in read_unit(unit, source)]
        assert len(chunks) > 2
        assert max(sum(map(len, chunk.texts)) for chunk in chunks) < 12_000_000
        assert max(len(chunk.rejections) for chunk in chunks) < 150_000
