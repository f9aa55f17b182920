"""Decontamination: planted evaluation texts are found, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.build import build
from prep.commands.dry_run import count
from prep.config import DecontaminationConfig
from prep.inputs import decontamination
from prep.inputs.decontamination import read_evaluation
from prep.inputs.hooks import recipe_identity
from prep.ngrams import ngram_hashes, words_of
from streaming_rwkv.config import UserError

ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom"  # 18 words
CHINESE = "床前明月光，疑是地上霜。举头望明月"


def evaluation(file: Path, *records: object, ngram: int = 13):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_evaluation(DecontaminationConfig(files=[str(file)], ngram=ngram))


def test_words_are_normalized_and_characters_are_words():
    assert words_of("Don't  STOP_now,\nＡ１ é 床前 かな한국 x2") == [
        *["don", "t", "stop", "now", "a1", "é", "床", "前", "か", "な", "한국", "x2"]
    ]


def test_a_hash_belongs_to_a_run_of_words():
    hashes = ngram_hashes("a b c a b", 2)  # ab bc ca ab
    assert hashes[0] == hashes[3]
    assert len(np.unique(hashes)) == 3
    assert ngram_hashes("b a", 2)[0] != hashes[0]
    assert ngram_hashes("a B. c!", 3).tolist() == ngram_hashes("A b - C", 3).tolist()
    assert len(ngram_hashes("a b", 3)) == 0


def test_planted_texts_are_found(tmp_path):
    found = evaluation(tmp_path / "e.jsonl", {"question": ENGLISH, "answers": [{"text": CHINESE}]})
    words = words_of(ENGLISH)
    texts = [
        "before " + " ".join(words[3:16]) + " after",  # 13 of its words
        "before " + " ".join(words[3:15]) + " after",  # 12
        "x " + ENGLISH.upper().replace(" ", "\n") + " y",
        f"诗：{CHINESE[:15]}。",  # 13 characters and 2 marks
        f"诗：{CHINESE[:13]}。",  # 11
        " ".join(reversed(words)),
        "",
    ]
    assert found.contaminated(texts) == [0, 2, 3]


def test_texts_of_a_record_count_each_by_itself(tmp_path):
    found = evaluation(tmp_path / "e.jsonl", {"a": "one two", "b": ["three four", 5, None]}, ngram=2)
    assert found.contaminated(["one two", "three, four", "two three", "four five"]) == [0, 1]
    assert len(found) == 2


def test_parquet_and_several_files_are_read(tmp_path):
    pq.write_table(pa.table({"sentence": ["one two three"], "id": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"goal": "four five six"}]))
    found = read_evaluation(DecontaminationConfig(files=[str(tmp_path)], ngram=3))
    assert found.contaminated(["x one two three", "four five six y", "one two four"]) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": "one two"}\n', r"decontaminate.files: no text of 13 words or more in .*; lower `decontaminate.ngram`"),
        ('{"a": "one two"}\n{"a": \n{"a": "b"}\n', r"e.jsonl: row 1: invalid JSON; fix it: an evaluation set"),
    ],
)
def test_evaluation_files_are_read_as_a_whole(tmp_path, content, message):
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_evaluation(DecontaminationConfig(files=[str(tmp_path / "e.jsonl")]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"decontaminate: .*none.jsonl: no such file or folder"):
        read_evaluation(DecontaminationConfig(files=[str(tmp_path / "none.jsonl")]))


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(decontamination, "_MOST_NGRAMS", 5)
    with pytest.raises(UserError, match=r"more than 5 different 13-grams; name evaluation sets only"):
        evaluation(tmp_path / "e.jsonl", {"text": ENGLISH})


@pytest.fixture
def recipe(config, tmp_path, write_lines):
    """Return a function that makes a recipe with two planted documents among 200."""
    texts = [f"document {number} speaks of foxes and dogs " * (1 + number % 5) for number in range(200)]
    texts[20], texts[150] = f"Quote: {ENGLISH}!", f"诗 {CHINESE}"
    write_lines(tmp_path / "corpus" / "a.jsonl", texts)
    write_lines(tmp_path / "eval.jsonl", [ENGLISH, CHINESE])

    def make(**values):
        files = [str(tmp_path / "eval.jsonl")]
        return config(**{"decontaminate": {"files": files}, "unit_bytes": 4000, "on_error": "stop", **values})

    return make


def test_planted_documents_are_counted_and_listed(recipe, tmp_path):
    manifest = build(recipe()).manifest
    assert manifest.counts["corpus"].rejected == {"contaminated": 2}
    assert manifest.counts["corpus"].documents["train"] == 198
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in listed] == [(20, "contaminated"), (150, "contaminated")]
    assert sum(unit.rejected.get("contaminated", 0) for unit in count(recipe()).records) == 2


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(recipe, tmp_path):
    manifests = [build(recipe(out=str(tmp_path / str(workers)), workers=workers)).manifest for workers in (1, 2)]
    assert manifests[0].to_json() == manifests[1].to_json()
    assert manifests[0].counts["corpus"].rejected == {"contaminated": 2}


def test_the_fingerprint_depends_on_the_evaluation_texts(recipe, tmp_path, write_lines):
    plain = recipe_identity(recipe(decontaminate=None))
    assert "decontaminate" not in plain  # finished data sets keep their identity
    before = recipe_identity(recipe())
    write_lines(tmp_path / "moved" / "other_name.jsonl", [ENGLISH, CHINESE])
    moved = {"files": [str(tmp_path / "moved")]}
    assert recipe_identity(recipe(decontaminate=moved)) == before
    assert recipe_identity(recipe(decontaminate=moved | {"ngram": 8})) != before
    write_lines(tmp_path / "moved" / "other_name.jsonl", [ENGLISH])
    assert recipe_identity(recipe(decontaminate=moved)) != before
    assert build(recipe()).manifest.config["decontaminate"] == before["decontaminate"]
    with pytest.raises(UserError, match=r"since it began this changed:\n.*decontaminate"):
        build(recipe(decontaminate=moved))
