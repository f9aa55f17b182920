"""Counts balance for any corpus."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.build import build
from prep.dataset.verification import verify
from streaming_rwkv.shards import SourceCounts
from streaming_rwkv.tokenizer import load_tokenizer

BROKEN = [
    (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    (b'{"text": "cut of', "invalid JSON"),
    (b'{"text": null}', "'text' is null"),
    (b'{"text": 5}', "'text' is not a string"),
    (b'{"text": {"nested": {"text": "x"}}}', "'text' is not a string"),
    (b'{"body": "x"}', "no 'text'"),
    (b"[1, 2]", "not a JSON object"),
]


def line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode()


def lay_out(folder: Path, long_text: str) -> tuple[list[str], dict[str, int]]:
    """A corpus with everything in it; returns the texts that are fine, duplicates included, and the rejections."""
    folder.mkdir()
    (folder / "bom_crlf.jsonl").write_bytes(
        b"\xef\xbb\xbf" + line("with a mark") + b"\r\n" + line("and CRLF") + b"\r\n"
    )
    (folder / "broken.jsonl").write_bytes(b"\n".join([line("before"), *(bad for bad, _ in BROKEN), line("after")]))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.json.gz").write_bytes(gzip.compress(b""))
    (folder / "long.jsonl.gz").write_bytes(gzip.compress(line(long_text) + b"\n", compresslevel=1))
    (folder / "array.json").write_bytes(b'[{"text": "in an array"}, null, {"text": "before"}]')
    column = ["one", None, "one", "二"]
    for name, kind in {
        "dictionary": pa.dictionary(pa.int8(), pa.string()),
        "large": pa.large_string(),
        "binary": pa.binary(),
    }.items():
        pq.write_table(pa.table({"text": pa.array(column, pa.string()).cast(kind)}), folder / f"{name}.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "no_rows.parquet")
    reasons = [*(reason for _, reason in BROKEN), "not a JSON object", *["'text' is null"] * 3]
    fine = ["with a mark", "and CRLF", "before", "after", long_text, "in an array", "before", *["one", "one", "二"] * 3]
    return fine, {reason: reasons.count(reason) for reason in sorted(set(reasons))}


@pytest.mark.parametrize(
    ("megabytes", "long_documents"),
    [(1, "split"), (1, "truncate"), (1, "drop"), pytest.param(8, "split", marks=pytest.mark.slow)],
    ids=lambda value: f"{value}MB-on-one-line" if isinstance(value, int) else value,
)
def test_counts_balance_for_every_kind_of_document(config, tmp_path, long_documents, megabytes):
    long_text = "0123456789 " * (megabytes * 1_000_000 // 11)
    fine, broken = lay_out(tmp_path / "corpus", long_text)
    counts = build(config(long_documents=long_documents, validation=0.3, split_seed=1)).manifest.counts["corpus"]
    verify(tmp_path / "out")
    kept = set(fine) - ({long_text} if long_documents == "drop" else set())
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    targets = {text: len(tokenizer.encode(text)) + 1 for text in set(fine)}
    rejected = broken | ({"longer than 2048": 1} if long_documents == "drop" else {})
    cut = targets[long_text] - 2048 if long_documents == "truncate" else 0
    copies = [text for text in set(fine) for _ in range(fine.count(text) - 1)]
    assert counts == SourceCounts(
        documents_read=len(fine) + sum(broken.values()),
        documents=counts.documents,
        duplicates=len(copies),
        rejected=rejected,
        targets_read=sum(targets[text] for text in fine if text in kept),
        targets=counts.targets,
        targets_duplicate=sum(targets[text] for text in copies),
        targets_cut=cut,
    )
    assert sum(counts.documents.values()) == len(kept)
    assert sum(counts.targets.values()) == sum(targets[text] for text in kept) - cut
    assert counts.imbalance() is None
    listed = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert len(listed) == sum(rejected.values())
