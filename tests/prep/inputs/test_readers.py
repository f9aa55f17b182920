"""Readers on whole, odd and broken files."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from prep.config import SourceConfig
from prep.inputs import readers
from prep.inputs.files import find_files
from prep.inputs.readers import InputError, Part, read_part
from prep.inputs.units import plan_units, read_unit
from streaming_rwkv.config import UserError


def read(
    path: Path, *, unit_bytes: int = 1 << 20, **config: object
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """((row, text) of the documents, (row, reason) of the rejections)."""
    source = SourceConfig(paths=[str(path)], **config)
    texts, rejections = [], []
    for unit in plan_units({"s": source}, unit_bytes=unit_bytes):
        for documents in read_unit(unit, source):
            texts += zip(documents.rows.tolist(), documents.texts, strict=True)
            rejections += [(rejection.row, rejection.reason) for rejection in documents.rejections]
    return texts, rejections


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text, "url": "u"}).encode() + b"\n" for text in texts)


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


def test_a_line_of_fifty_megabytes(tmp_path):
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
        ("a.jsonl.gz", b"", "is empty, and not even an empty file is when compressed; download it again"),
        ("a.json.zst", b"", "is empty"),
        ("a.json", b'[{"text": "one"},', "begins with '\\[' but is no JSON array"),
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
def test_documents_without_the_key_are_rejected_however_many_lie_together(tmp_path, unit_bytes):
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
            "an object that goes on over lines: write one object",
        ),
        ("a.json", b'{"text": "one",\n "url": "u"}', "an object that goes on over lines"),
        (
            "a.jsonl",
            b"<!DOCTYPE html>\n<title>404</title>",
            "it begins with '<!DOCTYPE html>': write one object a line",
        ),
        ("a.jsonl", (lines("x" * 99)[:80] + b"\n") * 2, 'it begins with \'{"text": "xxx'),
    ],
    ids=["LFS", "UTF-16", "UTF-16 LE", "UTF-16 BE", "indented", "two lines", "HTML", "cut off"],
)
def test_a_file_of_which_no_line_is_an_object_stops_saying_what_it_is(tmp_path, name, content, what):
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


def test_python_writes_nan_and_infinity(tmp_path):
    records = [{"text": f"x{number}", "score": number} for number in (float("nan"), float("inf"), -float("inf"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.json").write_text(json.dumps(records[:1]))
    broken = [b'{"text": "\\ud800", "score": NaN}', b'{"text": NaN}', b'{"score": NaN', b'{"a":' * 5000]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([*broken, b'{"text": "\\ud83c\\udf89", "score": NaN}']))
    assert read(tmp_path) == (
        [(0, "xnan"), (1, "xinf"), (2, "x-inf"), (0, "xnan"), (4, "🎉")],
        [(0, "invalid JSON"), (1, "'text' is not a string"), (2, "invalid JSON"), (3, "invalid JSON")],
    )


HALF_EMOJI = b'{"text": "%b", "title": "cut \\ud83d"}'
BAD_BYTE = b'{"text": "%b", "url": "http://x/\xff"}'
MANY_DIGITS = b'{"text": "%b", "number": ' + b"1" * 5000 + b"}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_only_what_is_used_can_reject_a_document(tmp_path, name):
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_hook_is_given_text_only(tmp_path, hooks, name):
    records = [HALF_EMOJI % b"one", BAD_BYTE % b"two", b'{"text": "three", "id": 1}', b'{"text": "four", "id": 2}']
    content = b"\n".join(records) if name == "a.jsonl" else b"[" + b", ".join(records) + b"]"
    (tmp_path / name).write_bytes(content)
    texts, rejections = read(tmp_path / name, filter=f"{hooks}:short")
    assert texts == [(2, "three"), (3, "four")]
    assert [row for row, _ in rejections] == [0, 1]


@pytest.mark.parametrize("unit_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize(("name", "compress"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)])
def test_a_line_that_is_too_long_is_rejected_however_it_is_cut(tmp_path, monkeypatch, name, compress, unit_bytes):
    monkeypatch.setattr(readers, "_MOST_LINE_BYTES", 100)
    monkeypatch.setattr(readers, "_READ_BYTES", 64)
    fits, too_long = "x" * (100 - len(lines("")) + 1), "x" * (101 - len(lines("")) + 1)
    spaces = lines("five")[:-1] + b" " * 100 + b"\n"
    content = lines("one", fits, too_long, "three", "y" * 5000) + spaces + lines("last", "z" * 5000)[:-3]
    (tmp_path / name).write_bytes(compress(content))
    assert read(tmp_path / name, unit_bytes=unit_bytes) == (
        [(0, "one"), (1, fits), (3, "three"), (6, "last")],
        [(row, "line longer than 256 MiB") for row in (2, 4, 5, 7)],
    )


def test_a_line_that_is_too_long_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST_LINE_BYTES", 1 << 20)
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


def test_an_array_that_is_too_long_is_an_error_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST_ARRAY_BYTES", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * (3 << 20) + b"]"))
    with pytest.raises(
        InputError, match=r"a\.json\.gz: is one JSON array of more than 1 MiB, .* write one object a line"
    ):
        read(tmp_path / "a.json.gz")


class FailingFile(io.FileIO):
    """A disk that gives the first 64 kB and the last ones, and nothing between."""

    def readinto(self, buffer):
        if 1 << 16 <= self.tell() < os.fstat(self.fileno()).st_size - (1 << 16):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(memoryview(buffer)[: 1 << 15])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_disk_that_fails_is_no_broken_file(tmp_path, monkeypatch, name):
    texts = [np.random.default_rng(row).bytes(2000).hex() for row in range(400)]
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.rpartition(".")[2], bytes)
    if name == "a.parquet":
        write_parquet(tmp_path / name, pa.array(texts), row_group_size=10)
    else:
        (tmp_path / name).write_bytes(compress(lines(*texts)))
    (file,) = find_files("s", [str(tmp_path / name)])
    source = SourceConfig(paths=["x"])
    part = Part(file=file, row_groups=tuple(range(40)) if name == "a.parquet" else None)
    whole = [text for batch in read_part(part, source) for text in batch.texts]
    assert whole == texts
    monkeypatch.setattr("prep.inputs.files._open_unbuffered", FailingFile)
    wanted = r"cannot be read \(Input/output error\); finished work is kept, run the same command again when it can be"
    with pytest.raises(UserError, match=wanted) as caught:
        list(read_part(part, source))
    assert str(caught.value).startswith(f"{tmp_path / name}: cannot")


def test_many_small_zstd_frames_and_a_large_one(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    large = np.random.default_rng(1).bytes(2_000_000).hex()
    small = [compress(lines(str(number))) for number in range(30_000)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join([*small, compress(lines(large)), *small]))
    texts = [text for _, text in read(tmp_path / "a.jsonl.zst")[0]]
    numbers = [str(number) for number in range(30_000)]
    assert texts == [*numbers, large, *numbers]


def test_a_file_that_becomes_shorter_while_it_is_read_is_no_end(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(*["x" * 1000] * 3000))
    source = SourceConfig(paths=[str(file)])
    (unit,) = plan_units({"s": source}, unit_bytes=1 << 24)
    reading = read_part(unit.parts[0], source)
    next(reading)
    os.truncate(file, 2_000_000)
    with pytest.raises(InputError, match=r"a\.jsonl: has lost \d+ bytes since it was listed"):
        list(reading)
    with pytest.raises(UserError, match=r"a\.jsonl: has changed since it was listed"):
        list(read_part(unit.parts[0], source))


def test_a_large_array_and_rejections_do_not_pile_up(tmp_path):
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


# --- parquet ---


def write_parquet(file: Path, column: pa.Array, *, name: str = "text", row_group_size: int = 1000) -> Path:
    table = pa.table({"id": pa.array(range(len(column))), name: column})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_kind_of_string_column(tmp_path, kind):
    column = pa.array(["one", "二", None, "", "one"], pa.string()).cast(kind)
    file = write_parquet(tmp_path / "a.parquet", column)
    expected = ([(0, "one"), (1, "二"), (3, ""), (4, "one")], [(2, "'text' is null")])
    assert read(file) == expected


def test_a_parquet_file_without_rows(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", pa.array([], pa.string()))) == ([], [])


def test_a_column_of_nulls_is_rejected_row_by_row(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", pa.nulls(2))
    assert read(file) == ([], [(0, "'text' is null"), (1, "'text' is null")])


def test_invalid_utf8_in_a_string_column(tmp_path):
    broken = pa.array([b"one", b"\xff", b"two"], pa.binary())
    column = pa.StringArray.from_buffers(3, *broken.buffers()[1:])
    assert read(write_parquet(tmp_path / "a.parquet", column)) == ([(0, "one"), (2, "two")], [(1, "invalid UTF-8")])


def test_row_groups_become_parts_whose_rows_go_on(tmp_path):
    texts = [f"{number:05}" * 20 for number in range(1000)]
    file = write_parquet(tmp_path / "a.parquet", pa.array(texts), row_group_size=100)
    source = SourceConfig(paths=[str(file)])
    units = plan_units({"s": source}, unit_bytes=20_000)
    assert len(units) > 2
    assert [part.row_groups for unit in units for part in unit.parts][:2] == [(0,), (1,)]
    documents = [documents for unit in units for documents in read_unit(unit, source)]
    assert np.concatenate([part.rows for part in documents]).tolist() == list(range(1000))
    assert [text for part in documents for text in part.texts] == texts


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("body", pa.array(["x"]), "no column 'text', it has id, body; name the right one with `sources.s.text`"),
        ("text", pa.array([1]), "column 'text' is of type int64, expected strings"),
    ],
)
def test_a_parquet_file_without_text_says_what_it_has(tmp_path, name, column, message):
    with pytest.raises(InputError, match=rf"a\.parquet: {message}"):
        read(write_parquet(tmp_path / "a.parquet", column, name=name))


def test_a_parquet_file_that_is_broken_inside_is_no_end(tmp_path):
    texts = [np.random.default_rng(row).bytes(2000).hex() for row in range(100)]
    file = write_parquet(tmp_path / "a.parquet", pa.array(texts), row_group_size=10)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = bytes(5000)
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: broken parquet after row \d+ .*; download it again"):
        read(file)


# --- units ---


def test_lines_of_a_large_file_become_parts_with_the_same_rows(tmp_path):
    texts = [f"line {number} " * (number % 7) for number in range(500)]
    (tmp_path / "a.jsonl").write_bytes(lines(*texts[:250]) + b"\n" + lines(*texts[250:]))
    whole = read(tmp_path / "a.jsonl")
    source = SourceConfig(paths=[str(tmp_path)])
    units = plan_units({"s": source}, unit_bytes=1000)
    assert len(units) > 10
    assert all(unit.input_bytes >= 1000 for unit in units[:-1])
    pieces = [documents for unit in units for documents in read_unit(unit, source)]
    rows = [row for documents in pieces for row in documents.rows.tolist()]
    assert rows == [*range(250), *range(251, 501)]
    assert [text for documents in pieces for text in documents.texts] == texts == [text for _, text in whole[0]]
    assert len({key for documents in pieces for key in documents.keys.tolist()}) == 500


def test_a_last_line_without_newline_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*"abcdefgh").rstrip())
    source = SourceConfig(paths=[str(tmp_path)])
    units = plan_units({"s": source}, unit_bytes=40)
    assert "".join(text for unit in units for part in read_unit(unit, source) for text in part.texts) == "abcdefgh"


def test_small_files_go_together_and_sources_by_name(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_bytes(lines("x" * 100))
    sources = {name: SourceConfig(paths=[str(tmp_path)]) for name in ("b", "a")}
    units = plan_units(sources, unit_bytes=400)
    assert [(unit.source, [part.file.name for part in unit.parts]) for unit in units] == [
        ("a", ["0.jsonl", "1.jsonl", "2.jsonl"]),
        ("a", ["3.jsonl", "4.jsonl", "5.jsonl"]),
        ("b", ["0.jsonl", "1.jsonl", "2.jsonl"]),
        ("b", ["3.jsonl", "4.jsonl", "5.jsonl"]),
    ]
    assert len({unit.name for unit in units}) == 4


def test_a_unit_has_another_name_when_it_would_give_other_documents(tmp_path):
    def name(**values):
        (unit,) = plan_units({"s": SourceConfig(paths=[str(tmp_path / "corpus")], **values)}, unit_bytes=400)
        return unit.name

    file = tmp_path / "corpus" / "a.jsonl"
    file.parent.mkdir()
    file.write_bytes(lines("one"))
    os.utime(file, (1, 1))
    first = name()
    (tmp_path / "corpus").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "corpus")
    assert name() == first
    assert name(text="content") != first
    os.utime(file, (2, 2))
    assert name() != first


def test_a_gzip_file_cannot_be_cut(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*"abc" * 100), compresslevel=0))
    (unit,) = plan_units({"s": SourceConfig(paths=[str(tmp_path)])}, unit_bytes=100)
    assert unit.parts == (Part(file=find_files("s", [str(tmp_path)])[0]),)


# --- hooks ---


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    (tmp_path / "hooks_of_this_test.py").write_text(
        "def short(record): return record['id'] < 3\n"
        "def joined(record): return None if record['id'] == 1 else f\"{record['title']}: {record['id']}\"\n"
        "def number(record): return 5\n"
        "def fails(record): return record['nope']\n"
        "def surrogate(record): return '\\ud800'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "hooks_of_this_test"


@pytest.fixture(params=["jsonl", "json", "parquet"])
def titled(request, tmp_path):
    records = [{"id": number, "title": f"t{number}", "text": f"x{number}"} for number in range(4)]
    file = tmp_path / f"titled.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    elif request.param == "json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_filter_sees_the_whole_record(titled, hooks):
    assert read(titled, filter=f"{hooks}:short") == (
        [(0, "x0"), (1, "x1"), (2, "x2")],
        [(3, "rejected by the filter")],
    )


def test_a_transform_makes_the_text_after_the_filter(titled, hooks):
    assert read(titled, filter=f"{hooks}:short", transform=f"{hooks}:joined") == (
        [(0, "t0: 0"), (2, "t2: 2")],
        [(1, "rejected by the transform"), (3, "rejected by the filter")],
    )


def test_with_a_transform_no_text_column_is_needed(titled, hooks):
    assert len(read(titled, transform=f"{hooks}:joined", text="absent")[0]) == 3


def test_a_transform_that_gives_no_text_is_a_broken_document(titled, hooks):
    assert read(titled, transform=f"{hooks}:number")[1][0] == (0, "'text' is not a string")
    assert read(titled, transform=f"{hooks}:surrogate")[1][0] == (0, "invalid UTF-8")


def test_invalid_utf8_in_any_column_that_a_hook_sees(tmp_path, hooks):
    broken = pa.array([b"zero", b"\xff", b"two"], pa.binary())
    titles = pa.StringArray.from_buffers(3, *broken.buffers()[1:])
    pq.write_table(pa.table({"id": [0, 1, 2], "title": titles, "text": ["x0", "x1", "x2"]}), tmp_path / "a.parquet")
    expected = ([(0, "x0"), (2, "x2")], [(1, "invalid UTF-8")])
    assert read(tmp_path / "a.parquet", filter=f"{hooks}:short") == expected


def test_a_filter_that_rejects_all_leaves_no_broken_file(tmp_path, hooks):
    (tmp_path / "a.jsonl").write_text('{"id": 5}\n{"id": 6}\n')
    rejected = [(0, "rejected by the filter"), (1, "rejected by the filter")]
    assert read(tmp_path / "a.jsonl", filter=f"{hooks}:short") == ([], rejected)


def test_a_hook_that_raises_names_file_and_row(titled, hooks):
    with pytest.raises(InputError, match=r"titled\.\w+: row 0: a hook of `sources.s` raised KeyError: 'nope'"):
        read(titled, transform=f"{hooks}:fails")


def test_a_part_reads_by_itself(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    (file,) = find_files("s", [str(tmp_path)])
    (batch,) = read_part(Part(file=file), SourceConfig(paths=["x"]))
    assert (batch.texts, batch.rows.tolist(), batch.characters) == (["one"], [0], 3)
