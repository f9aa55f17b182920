"""Hooks: filters and transforms of records."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.config import PrepConfig, SourceConfig
from prep.inputs.faults import InputError
from prep.inputs.hooks import load_hook, recipe_identity
from streaming_rwkv.config import UserError
from tests.prep.inputs.reading import BAD_BYTE, HALF_EMOJI, read


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


def test_invalid_utf8_in_a_column_that_a_hook_sees_is_rejected(tmp_path, hooks):
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_hook_gets_text_only(tmp_path, hooks, name):
    records = [HALF_EMOJI % b"one", BAD_BYTE % b"two", b'{"text": "three", "id": 1}', b'{"text": "four", "id": 2}']
    content = b"\n".join(records) if name == "a.jsonl" else b"[" + b", ".join(records) + b"]"
    (tmp_path / name).write_bytes(content)
    texts, rejections = read(tmp_path / name, filter=f"{hooks}:short")
    assert texts == [(2, "three"), (3, "four")]
    assert [row for row, _ in rejections] == [0, 1]


def test_an_edited_hook_is_another_configuration(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hook_of_this_test.py").write_text("def keep(record): return True\n")
    source = SourceConfig(paths=["corpus"], filter="hook_of_this_test:keep")
    config = PrepConfig(out="o", tokenizer="t", sources={"c4": source})
    before = recipe_identity(config)
    (tmp_path / "hook_of_this_test.py").write_text("def keep(record): return False\n")
    assert recipe_identity(config) != before


@pytest.mark.parametrize("name", ["no_such_module:keep", "json:no_such_function"])
def test_a_hook_that_is_not_there_is_explained(name):
    with pytest.raises(UserError, match=f"hook '{name}'.*give module:function"):
        load_hook(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import sys\nsys.exit(3)\n", "hook 'raising_{}:keep': its module raised SystemExit: 3; fix it"),
        ("1 / 0\n", "hook 'raising_{}:keep': its module raised ZeroDivisionError: division by zero; fix it"),
        ("keep = 5\n", "hook 'raising_{}:keep': is a int, expected a function"),
    ],
)
def test_a_module_that_raises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    number = len(content)
    (tmp_path / f"raising_{number}.py").write_text(content)
    with pytest.raises(UserError) as raised:
        load_hook(f"raising_{number}:keep")
    assert str(raised.value) == message.format(number)
