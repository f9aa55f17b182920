"""The recipes that come with the project, on files laid out and named as the data sets are on the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.build import build
from prep.config import PrepConfig
from streaming_rwkv.config import load_config

YAMLS = Path(__file__).parents[3] / "yamls" / "prep"


def text(name: str) -> str:
    return f"a document of {name}"


def json_lines(root: Path, name: str, **columns: object) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"text": text(name), **columns}, ensure_ascii=False)
    file.write_bytes(gzip.compress((line + "\n").encode()))


def parquet(root: Path, name: str, **columns: pa.DataType) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    others = {column: pa.array([None], kind) for column, kind in columns.items()}
    pq.write_table(pa.table({"text": pa.array([text(name)]), **others}), file)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "hub"
    c4 = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://klyq.com/"}
    for number in range(2):
        json_lines(root, f"c4/en/c4-train.{number:05}-of-01024.json.gz", **c4)
        json_lines(root, f"c4/multilingual/c4-zh.tfrecord-{number:05}-of-01024.json.gz", **c4)
    json_lines(root, "c4/en/c4-validation.00000-of-00008.json.gz", **c4)
    json_lines(root, "c4/multilingual/c4-af.tfrecord-00000-of-00064.json.gz", **c4)
    for industry in (
        "computer_programming_code",
        "subject_education_education",
        "current_affairs_government_administration",
    ):
        extra = {"alnum_ratio": 0.9, "lang": "zh", "quality_score": 0.8, "meta": {"nested": [1, 2]}}
        json_lines(root, f"IndustryCorpus/zh/{industry}/rank_00000.jsonl.gz", **extra)
        json_lines(root, f"IndustryCorpus/zh/{industry}/high/rank_00001.jsonl.gz", **extra)
    string, number = pa.string(), pa.int64()
    parquet(
        root,
        "smollm-corpus/cosmopedia-v2/train-00000-of-00104.parquet",
        prompt=string,
        token_length=number,
        audience=string,
        format=string,
        seed_data=string,
    )
    parquet(
        root,
        "smollm-corpus/python-edu/train-00000-of-00002.parquet",
        blob_id=string,
        repo_name=string,
        path=string,
        length_bytes=number,
        score=pa.float64(),
        int_score=number,
    )
    parquet(root, "chinese-fineweb-edu/data/part-00000.parquet", score=pa.float64(), source=string)
    metadata = pa.struct([("dump", string), ("url", string)])
    parquet(root, "fineweb-edu-mini-combined/data/train-00000-of-00010.parquet", id=string, metadata=metadata)
    monkeypatch.setenv("CORPUS", str(root))
    return root


def built(name: str, tmp_path: Path, tokenizer_folder: Path) -> dict[str, int]:
    overrides = [f"out={tmp_path / 'out'}", f"tokenizer={tokenizer_folder}", "workers=1"]
    manifest = build(load_config(PrepConfig, YAMLS / name, overrides=overrides)).manifest
    assert not any(counts.rejected for counts in manifest.counts.values())
    return {source: counts.documents_read for source, counts in manifest.counts.items()}


def test_stage_1_reads_c4s_training_files_in_two_languages(hub, tmp_path, tokenizer_folder):
    assert built("stage1.yaml", tmp_path, tokenizer_folder) == {"c4-en": 2, "c4-zh": 2}


def test_stage_2_reads_every_corpus(hub, tmp_path, tokenizer_folder):
    assert built("stage2.yaml", tmp_path, tokenizer_folder) == {
        "chinese-fineweb-edu": 1,
        "cosmopedia-v2": 1,
        "fineweb-edu": 1,
        "industry-edu": 2,
        "industry-politic": 2,
        "industry-program": 2,
        "python-edu": 1,
    }
