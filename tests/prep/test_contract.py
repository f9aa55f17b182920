"""docs/contract.md says what happens."""

from __future__ import annotations

import json
from pathlib import Path

from prep.build import build
from prep.dataset.shard_reader import read_shard
from streaming_rwkv.tokenizer import load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"


def test_the_worked_example_of_the_contract_is_built(config, write_lines, tmp_path):
    write_lines(tmp_path / "corpus" / "a.jsonl", ["012", "34", "0123456"])
    manifest = build(config(edges=[3, 5], pack_tokens=8)).manifest
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    spelled = {int(tokenizer.encode(digit)[0]): digit for digit in "0123456"} | {tokenizer.eos_id: "|"}
    found = {
        stream.path: [
            {
                "tokens": "".join(spelled[token] for token in pack["tokens"].tolist()),
                "lengths": pack["lengths"].tolist(),
                "starts": pack["starts"].tolist(),
                "bytes": pack["bytes"].tolist(),
            }
            for shard in stream.shards
            for pack in read_shard(tmp_path / "out" / stream.path / shard.basename, shard)
        ]
        for stream in manifest.streams
    }
    assert found == json.loads(PAGE.read_text(encoding="utf-8").partition("```json")[2].partition("```")[0])
    short, long = manifest.streams
    assert (short.documents, long.documents) == (1, 2)  # the rest of a document is no document
    assert (short.targets, long.targets) == (6, 9)
    assert manifest.counts["corpus"].targets_read == 4 + 3 + 8
