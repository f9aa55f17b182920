"""Helpers of the tests of readers: files to write and to read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prep.config import SourceConfig
from prep.inputs.readers import read_unit
from prep.inputs.units import plan_units

HALF_EMOJI = b'{"text": "%b", "title": "cut \\ud83d"}'
BAD_BYTE = b'{"text": "%b", "url": "http://x/\xff"}'


def read(
    path: Path, *, unit_bytes: int = 1 << 20, **config: object
) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return (row, text) of the documents and (row, reason) of the rejections."""
    source = SourceConfig(paths=[str(path)], **config)
    texts, rejections = [], []
    for unit in plan_units({"s": source}, unit_bytes=unit_bytes):
        for documents in read_unit(unit, source):
            texts += zip(documents.rows.tolist(), documents.texts, strict=True)
            rejections += [(rejection.row, rejection.reason) for rejection in documents.rejections]
    return texts, rejections


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text, "url": "u"}).encode() + b"\n" for text in texts)


def write_parquet(file: Path, column: pa.Array, *, name: str = "text", row_group_size: int = 1000) -> Path:
    table = pa.table({"id": pa.array(range(len(column))), name: column})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file
