"""Conversion of folders of JSON to folders of parquet."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.commands.convert import convert
from prep.inputs.faults import InputError
from streaming_rwkv.config import UserError


def test_a_folder_becomes_a_folder_of_the_same_shape(tmp_path, write_lines):
    write_lines(tmp_path / "in" / "a.jsonl", ["one", "二"], url="u")
    write_lines(tmp_path / "in" / "deep" / "c4-train.0.json.gz", ["three"])
    with (tmp_path / "in" / "a.jsonl").open("ab") as file:
        file.write(b'{"text": null}\n')
    converted = list(convert(str(tmp_path / "in"), tmp_path / "out"))
    assert [(file.name, file.documents, file.rejected) for file in converted] == [
        ("a.jsonl", 2, {"'text' is null": 1}),
        ("deep/c4-train.0.json.gz", 1, {}),
    ]
    table = pq.read_table(tmp_path / "out" / "a.parquet")
    assert table.column_names == ["text"]
    assert table["text"].to_pylist() == ["one", "二"]
    assert pq.read_table(tmp_path / "out" / "deep" / "c4-train.0.parquet")["text"].to_pylist() == ["three"]


def test_a_converted_file_is_skipped_until_its_source_changes(tmp_path, write_lines):
    write_lines(tmp_path / "in" / "a.jsonl", ["one"])
    assert [file.existed for file in convert(str(tmp_path / "in"), tmp_path / "out")] == [False]
    assert [file.existed for file in convert(str(tmp_path / "in"), tmp_path / "out")] == [True]
    write_lines(tmp_path / "in" / "a.jsonl", ["two"])
    assert [file.existed for file in convert(str(tmp_path / "in"), tmp_path / "out")] == [False]
    assert pq.read_table(tmp_path / "out" / "a.parquet")["text"].to_pylist() == ["two"]


def test_another_key_converts_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "one", "text": "two"}\n{"title": "three"}\n')
    to = tmp_path / "out"
    wanted = [({"no 'text'": 1}, False), ({"no 'text'": 1}, True), ({}, False)]
    for (rejected, existed), text in zip(wanted, ["text", "text", "title"], strict=True):
        (file,) = convert(str(tmp_path / "a.jsonl"), to, text=text)
        assert (file.rejected, file.existed) == (rejected, existed)
    assert pq.read_table(to / "a.parquet")["text"].to_pylist() == ["one", "three"]


def test_an_older_source_is_another_source(tmp_path, write_lines):
    for text, changed in (("one", 2_000_000_000), ("two", 1_000_000_000)):
        os.utime(write_lines(tmp_path / "a.jsonl", [text]), (changed, changed))
        assert [file.existed for file in convert(str(tmp_path / "a.jsonl"), tmp_path / "out")] == [False]
    assert pq.read_table(tmp_path / "out" / "a.parquet")["text"].to_pylist() == ["two"]


def test_an_empty_target_is_converted_again(tmp_path, write_lines):
    write_lines(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.parquet").touch()
    assert [file.existed for file in convert(str(tmp_path / "a.jsonl"), tmp_path / "out")] == [False]


@pytest.mark.parametrize("content", [None, b"PAR1 cut off"])
def test_a_target_that_convert_did_not_write_is_kept(tmp_path, write_lines, content):
    for name in "ab":
        write_lines(tmp_path / "in" / f"{name}.jsonl", ["one"])
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "b.parquet"
    if content is None:
        pq.write_table(pa.table({"x": [1]}), target)
    else:
        target.write_bytes(content)
    before = target.read_bytes()
    with pytest.raises(UserError) as caught:
        list(convert(str(tmp_path / "in"), tmp_path / "out"))
    assert str(caught.value) == f"{target}: exists, and was not written by this command; move it away, or name another"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b.parquet"]
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("to", "where"), [("in", "is the input"), ("in/out", "is inside .*/in"), (".", "contains .*/in"), ("set/x", "")]
)
def test_an_output_is_apart_from_the_input_and_from_data_sets(tmp_path, write_lines, to, where):
    write_lines(tmp_path / "in" / "a.jsonl", ["one"])
    (tmp_path / "set" / "tokenizer").mkdir(parents=True)
    (tmp_path / "set" / "manifest.json").touch()
    before = set(tmp_path.rglob("*"))
    expected = f"{where}, expected a folder apart" if where else "would be in .*/set, which is a data set; name another"
    with pytest.raises(UserError, match=expected):
        list(convert(str(tmp_path / "in"), tmp_path / to))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("notes", [{"origin": b"{"}, {}, {"rejected": b"[1]"}, {"rejected": b"[" * 100_000}])
def test_notes_that_this_program_did_not_write_are_no_result(tmp_path, write_lines, notes):
    status = os.stat(write_lines(tmp_path / "a.jsonl", ["one"]))
    origin = json.dumps({"text": "text", "bytes": status.st_size, "changed_ns": status.st_mtime_ns}).encode()
    table = pa.table({"text": ["x"]}).replace_schema_metadata(
        {f"streaming-rwkv.{name}": value for name, value in ({"origin": origin} | notes).items()}
    )
    (tmp_path / "out").mkdir()
    pq.write_table(table, tmp_path / "out" / "a.parquet")
    assert [file.existed for file in convert(str(tmp_path / "a.jsonl"), tmp_path / "out")] == [False]


def test_a_pipe_in_the_place_of_a_target_is_replaced(tmp_path, write_lines):
    write_lines(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "a.parquet")
    assert [file.existed for file in convert(str(tmp_path / "a.jsonl"), tmp_path / "out")] == [False]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, write_lines):
    file = write_lines(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b").write_text("a file")
    with pytest.raises(UserError, match=r"b: this folder of the parquet files cannot be made or written to"):
        list(convert(str(file), tmp_path / "b"))


def test_files_of_a_killed_conversion_are_replaced(tmp_path, write_lines, monkeypatch):
    write_lines(tmp_path / "a.jsonl", ["one"])
    started = (
        "import os, pyarrow.parquet as pq, prep.commands.convert as c\nc._texts = lambda *_: os.kill(os.getpid(), 9)\n"
    )
    run = f"list(c.convert({str(tmp_path / 'a.jsonl')!r}, {str(tmp_path / 'out')!r}))"
    subprocess.run([sys.executable, "-c", started + run], check=False, timeout=250)
    assert sorted(os.listdir(tmp_path / "out")) == [".a.parquet.tmp", ".lock"]
    list(convert(str(tmp_path / "a.jsonl"), tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.parquet"]


def test_a_path_may_contain_a_colon(tmp_path, write_lines, monkeypatch):
    write_lines(tmp_path / "a.jsonl", ["one"])
    monkeypatch.chdir(tmp_path)
    for existed in (False, True):
        assert [file.existed for file in convert("a.jsonl", "v:1")] == [existed]
    with (tmp_path / "v:1" / "a.parquet").open("rb") as file:
        assert pq.read_table(file)["text"].to_pylist() == ["one"]


def test_without_any_text_the_option_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n5\n')
    for _ in range(2):  # what is there counts as well
        with pytest.raises(UserError, match=r"of 3 documents 2 have no 'text'; name the key with --text"):
            list(convert(str(tmp_path / "a.jsonl"), tmp_path / "out"))


def test_another_key_can_be_converted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    list(convert(str(tmp_path / "a.jsonl"), tmp_path / "out", text="content"))
    assert pq.read_table(tmp_path / "out" / "a.parquet")["text"].to_pylist() == ["one"]


def test_processes_give_the_same_files(tmp_path, write_lines):
    for number in range(3):
        write_lines(tmp_path / "in" / f"{number}.jsonl.gz", [f"text {number}"])
    list(convert(str(tmp_path / "in"), tmp_path / "one"))
    list(convert(str(tmp_path / "in"), tmp_path / "two", workers=2))
    for number in range(3):
        name = f"{number}.parquet"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_broken_file_leaves_no_half_a_parquet(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99)[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: broken gzip"):
        list(convert(str(tmp_path / "a.jsonl.gz"), tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_files_with_one_target_are_refused(tmp_path, write_lines):
    write_lines(tmp_path / "a.jsonl", ["one"])
    write_lines(tmp_path / "a.json.gz", ["two"])
    with pytest.raises(UserError, match=r"a\.json\.gz, a\.jsonl would all become .*a\.parquet"):
        list(convert(str(tmp_path), tmp_path / "out"))


def test_a_folder_without_files_to_convert_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="no JSON file below it"):
        list(convert(str(tmp_path), tmp_path / "out"))


def test_one_process_converts_into_a_folder_at_a_time(tmp_path, write_lines):
    write_lines(tmp_path / "in" / "a.jsonl", ["one"])
    write_lines(tmp_path / "in" / "b.jsonl", ["two"])
    first = convert(str(tmp_path / "in"), tmp_path / "out")
    assert next(first).name == "a.jsonl"
    with pytest.raises(UserError, match=r"out: this folder of the parquet files is in use \(by process \d+\)"):
        list(convert(str(tmp_path / "in"), tmp_path / "out"))
    assert [file.name for file in first] == ["b.jsonl"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a.parquet", "b.parquet"]
