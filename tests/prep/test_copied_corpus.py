"""A finished data set whose corpus was copied: the same bytes with other times are the same input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prep.build import build
from prep.execution.task_store import WorkError
from prep.inputs import files
from streaming_rwkv.storage import open_store


@pytest.fixture
def corpus(write_lines, tmp_path) -> Path:
    for name in ("a", "b"):
        write_lines(tmp_path / "corpus" / f"{name}.jsonl", [f"{name} text"])
    return tmp_path / "corpus"


@pytest.mark.parametrize("workers", [1, 2])
def test_equal_content_with_other_times_is_not_a_change(config, corpus, workers):
    built = build(config(workers=workers))
    for file in corpus.iterdir():
        os.utime(file, (1, 1))
    again = build(config(workers=workers))
    assert again.was_finished
    assert again.manifest == built.manifest


def test_the_same_size_with_another_content_is_a_change(config, corpus):
    build(config())
    os.utime(corpus / "a.jsonl", (1, 1))
    (corpus / "b.jsonl").write_bytes((corpus / "b.jsonl").read_bytes().replace(b"b text", b"B text"))
    os.utime(corpus / "b.jsonl", (1, 1))
    with pytest.raises(WorkError) as raised:
        build(config())
    assert "files/corpus/b.jsonl: 19 bytes, changed at" in str(raised.value)
    assert "a.jsonl" not in str(raised.value)


def test_files_are_hashed_only_where_size_is_equal_and_time_is_not(config, corpus, monkeypatch, write_lines):
    build(config())
    compared = []
    monkeypatch.setattr("prep.execution.resume.content_digest", lambda file: compared.append(file.name))
    assert build(config()).was_finished
    write_lines(corpus / "a.jsonl", ["a longer text"])
    with pytest.raises(WorkError, match=r"files/corpus/a\.jsonl"):
        build(config())
    assert compared == []


def test_an_object_that_was_written_again_is_compared_by_its_etag(config, s3_place, tmp_path):
    files.bucket_store.cache_clear()
    store = open_store(s3_place)
    store.put_bytes(b'{"text": "x"}\n', "a.jsonl")
    sources = {"corpus": {"paths": s3_place}}
    build(config(sources=sources))
    state = tmp_path / "out" / ".prep" / "state.json"
    noted = json.loads(state.read_bytes())
    assert noted["contents"]["corpus/a.jsonl"].startswith("etag ")
    noted["files"]["corpus/a.jsonl"][1] = 0  # as if it had been written in 1970
    state.write_text(json.dumps(noted))
    assert build(config(sources=sources)).was_finished
    noted["contents"]["corpus/a.jsonl"] = "etag of something else"
    state.write_text(json.dumps(noted))
    with pytest.raises(WorkError, match=r"files/corpus/a\.jsonl: 14 bytes, changed at 0\.000, now 14 bytes"):
        build(config(sources=sources))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not the state of a build"),
        (b'{"files": {"corpus/a.jsonl": 5}}', "not the state of a build"),
        (b'{"files": {"corpus/a.jsonl": ["x", null]}}', "not the state of a build"),
        (b'{"files": {}, "contents": {"corpus/a.jsonl": "xxh3 0"}}', "not the state of a build"),
        (b'{"files": {}, "contents": []}', "not the state of a build"),
    ],
    ids=range(7),
)
def test_a_damaged_state_is_named(config, corpus, tmp_path, content, message):
    build(config())
    (tmp_path / "out" / ".prep" / "state.json").write_bytes(content)
    with pytest.raises(WorkError, match=rf"state\.json: {message}"):
        build(config())
