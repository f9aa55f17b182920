"""Units of work: decided by the input alone."""

from __future__ import annotations

import gzip
import os

from prep.config import SourceConfig
from prep.inputs.discovery import find_files
from prep.inputs.files import Part
from prep.inputs.readers import read_unit
from prep.inputs.units import plan_units
from tests.prep.inputs.reading import lines, read


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


def test_small_files_share_a_unit_and_sources_are_ordered_by_name(tmp_path):
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


def test_a_unit_that_would_give_other_documents_has_another_name(tmp_path):
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
