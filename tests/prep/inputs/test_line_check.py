"""Files that are not JSON lines, however they are divided into units."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from prep.build import build
from prep.commands.convert import convert
from prep.commands.dry_run import count
from prep.commands.train_tokenizer import train_tokenizer
from prep.config import SourceConfig
from prep.document import LineCounts, add_counts
from prep.inputs.discovery import find_files
from prep.inputs.faults import InputError
from prep.inputs.files import Part, Unit
from prep.inputs.line_check import describe, signature
from prep.inputs.readers import CutFiles
from prep.inputs.units import plan_units

DOCUMENTS = [{"text": f"document {number}"} for number in range(60)]
LINES = "".join(json.dumps(document) + "\n" for document in DOCUMENTS).encode()
PRETTY = "".join(json.dumps(document, indent=2) + "\n" for document in DOCUMENTS).encode()
ARRAY_OVER_LINES = ("[\n" + ",\n".join(map(json.dumps, DOCUMENTS)) + "\n]\n").encode()
CSV = b"id,text\n" + b"".join(b"%d,document\n" % number for number in range(60))
CHINESE = "".join(json.dumps({"text": "床前明月光"}, ensure_ascii=False) + "\n" for _ in DOCUMENTS)

OTHER_FILES = {
    "pretty-printed": (PRETTY, "no line of it is a JSON object; it begins with an object that spans several lines"),
    "array over lines": (
        ARRAY_OVER_LINES,
        "61 of its 62 lines are not JSON objects; the first of them begins with '[': let the name of a file that is "
        "one array end in .json",
    ),
    "CSV": (CSV, "no line of it is a JSON object; it begins with 'id,text': write one object per line"),
    "GBK": (CHINESE.encode("gbk"), "no line of it is a JSON object; it is not UTF-8: convert it"),
    "UTF-16": (LINES.decode().encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    "gzip": (gzip.compress(LINES, mtime=0), "it is compressed with gzip: add .gz to its name"),
    "zstd": (zstandard.compress(LINES), "it is compressed with zstd: add .zst to its name"),
    "xz": (lzma.compress(LINES), "it is compressed with xz: add .xz to its name"),
    "bzip2": (bz2.compress(LINES), "it is compressed with bzip2: add .bz2 to its name"),
    "two thirds": (
        b"".join(b"a\nb\n" + line for line in LINES.splitlines(keepends=True)),
        "120 of its 180 lines are not JSON objects; the first of them begins with 'a'",
    ),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(b'{"text": "the only good one"}\n')
    return folder


@pytest.mark.parametrize("unit_bytes", [1, 200, 1 << 20])
@pytest.mark.parametrize(("content", "message"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind_stops_the_build_however_it_is_cut(config, corpus, content, message, unit_bytes):
    (corpus / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError) as caught:
        build(config(unit_bytes=unit_bytes))
    assert str(caught.value).startswith(f"{corpus / 'a.jsonl'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("unit_bytes", [1, 200, 1 << 20])
def test_a_file_with_half_its_lines_broken_is_read_however_it_is_cut(config, corpus, unit_bytes):
    (corpus / "a.jsonl").write_bytes(b"broken\n" * 60 + LINES)
    counts = build(config(unit_bytes=unit_bytes)).manifest.counts["corpus"]
    assert (counts.documents["train"], counts.rejected) == (61, {"invalid JSON": 60})


def test_a_dry_run_stops_like_a_build(config, corpus):
    (corpus / "a.jsonl").write_bytes(PRETTY)
    with pytest.raises(InputError, match=r"a\.jsonl: no line of it is a JSON object"):
        count(config(unit_bytes=200))


@pytest.mark.slow
def test_workers_and_a_second_start_find_the_same(config, corpus):
    (corpus / "a.jsonl").write_bytes(ARRAY_OVER_LINES)
    for workers in (2, 1, 3):
        with pytest.raises(InputError, match=r"a\.jsonl: 61 of its 62 lines are not JSON objects"):
            build(config(unit_bytes=200, workers=workers))
    (corpus / "a.jsonl").write_bytes(LINES)
    assert build(config(unit_bytes=200), accept_changes=True).manifest.counts["corpus"].documents["train"] == 61


def test_a_conversion_stops_at_a_file_of_another_kind(corpus, tmp_path):
    (corpus / "a.jsonl").write_bytes(ARRAY_OVER_LINES)
    with pytest.raises(InputError, match=r"a\.jsonl: 61 of its 62 lines are not JSON objects"):
        list(convert(str(corpus), tmp_path / "parquet"))


def test_the_training_of_a_tokenizer_stops_at_a_file_of_another_kind(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.commands.train_tokenizer._UNIT_BYTES", 200)
    (corpus / "a.jsonl").write_bytes(PRETTY)
    with pytest.raises(InputError, match=r"a\.jsonl: no line of it is a JSON object"):
        train_tokenizer({"s": SourceConfig(paths=[str(corpus)])}, vocab_size=300, to=tmp_path / "tokenizer")


def test_an_array_on_one_line_of_json_lines_stops_the_build(config, corpus):
    (corpus / "a.jsonl").write_text(json.dumps(DOCUMENTS))
    with pytest.raises(InputError, match=r"no line of it is a JSON object; it begins with '\[': let the name"):
        build(config())


def test_an_array_of_other_things_than_objects_stops_the_build(config, corpus):
    (corpus / "a.json").write_text(json.dumps(["one", "two", {"text": "three"}]))
    with pytest.raises(InputError, match=r"a\.json: 2 of the 3 items of its array are not JSON objects; write one"):
        build(config())


def test_the_first_broken_line_is_described_wherever_it_is(config, corpus):
    (corpus / "a.jsonl.gz").write_bytes(gzip.compress(LINES + b"\n<html>\n" * 90))
    expected = r"90 of its 150 lines are not JSON objects; the first of them begins with '<html>'"
    with pytest.raises(InputError, match=expected):
        build(config())


def test_a_file_in_parts_is_judged_when_all_its_parts_were_read(corpus):
    (corpus / "a.jsonl").write_bytes(b"5\n" * 30 + LINES)
    units = [
        unit
        for unit in plan_units({"s": SourceConfig(paths=[str(corpus)])}, unit_bytes=400)
        if any(part.is_cut for part in unit.parts)
    ]
    assert len(units) > 3
    files = CutFiles(units)
    for unit in reversed(units[1:]):
        files.has_read(unit, {"a.jsonl": LineCounts(lines=1, not_objects=1)})
    with pytest.raises(InputError, match="no line of it is a JSON object"):
        files.has_read(units[0], {"a.jsonl": LineCounts(lines=1, not_objects=1)})
    files = CutFiles(units)
    for unit in units:
        files.has_read(unit, {})  # blank lines


def test_a_file_that_is_one_part_is_not_judged_again(corpus):
    (file,) = find_files("s", [str(corpus)])
    whole = Part(file=file, byte_range=(0, file.size))
    assert not whole.is_cut
    unit = Unit(name="u", source="s", parts=(whole,), input_bytes=1)
    CutFiles([unit]).has_read(unit, {"good.jsonl": LineCounts(1, 1)})


def test_counts_are_added_by_file():
    counts = [("a", LineCounts(2, 1)), ("b", LineCounts(1, 0)), ("a", LineCounts(3, 0))]
    assert add_counts(counts) == {"a": LineCounts(5, 1), "b": LineCounts(1, 0)}
    assert LineCounts(2, 1).are_json_lines
    assert not LineCounts(3, 2).are_json_lines


def test_one_broken_line_is_a_broken_document_unless_it_is_of_another_format():
    assert describe(1, 1, first=b'{"text": "cut o', is_utf8=True) is None
    assert describe(1, 1, first=b"[1]", is_utf8=True) is not None
    assert signature(b"PAR1\x15\x04") == "a parquet file: let its name end in .parquet"
    assert signature(b'{"text"') is None
