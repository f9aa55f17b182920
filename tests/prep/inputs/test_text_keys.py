"""The check of the text's key, before any source is read as a whole."""

from __future__ import annotations

import json

import pytest

from prep.build import build
from prep.commands.dry_run import count
from prep.inputs.text_keys import check_text_keys
from prep.inputs.units import find_sources
from streaming_rwkv.config import UserError


@pytest.fixture
def sources(tmp_path, write_lines):
    write_lines(tmp_path / "a" / "a.jsonl", ["hello"] * 3)
    (tmp_path / "z").mkdir()
    lines = [{"content": "hello", "id": number} for number in range(3)]
    (tmp_path / "z" / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: {"paths": str(tmp_path / name)} for name in ("a", "z")}


@pytest.mark.parametrize("command", [build, count])
def test_a_key_that_no_record_has_is_told_before_any_source_is_read(sources, config, tmp_path, monkeypatch, command):
    monkeypatch.setattr("prep.stages.tokenization.read_unit", None)
    with pytest.raises(UserError) as caught:
        command(config(sources=sources))
    assert str(caught.value) == (
        f"sources.z: no 'text' in the first 3 records of {tmp_path}/z/b.jsonl; their keys are 'content', 'id'; name "
        "the right key with `sources.z.text`, or remove the source"
    )


def test_a_column_that_a_parquet_file_lacks_is_told_before_any_source_is_read(sources, config, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "z" / "b.jsonl").unlink()
    pq.write_table(pa.table({"content": ["hello"], "id": [1]}), tmp_path / "z" / "b.parquet")
    monkeypatch.setattr("prep.stages.tokenization.read_unit", None)
    with pytest.raises(UserError, match=r"b\.parquet: no column 'text', found content, id; name the right one with"):
        build(config(sources=sources))


@pytest.mark.parametrize(
    "content",
    [
        '{"id": 1}\n{"text": "one of them has it"}\n',
        '{"text": null}\n',
        "",
        "not JSON, which the reader explains\n",
    ],
)
def test_what_may_have_a_text_is_left_to_the_readers(config, tmp_path, content):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text(content)
    settings = config()
    check_text_keys(settings.sources, find_sources(settings.sources))


def test_a_transform_needs_no_key(sources, config):
    sources["z"]["transform"] = "hooks:text_of"
    settings = config(sources=sources)
    check_text_keys(settings.sources, find_sources(settings.sources))
