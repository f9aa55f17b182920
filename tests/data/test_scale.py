"""Ten million packs in a hundred streams: start and resume take seconds. The indexes are real, the shards do not exist.

Calls are counted, not seconds, which depend on the machine: their number is the same everywhere, and far below that of
anything that walks through packs one by one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from streaming_rwkv.data.loader import LoaderOptions, PackDataset, share_of_batches
from streaming_rwkv.data.mixture import StageConfig, make_plan
from streaming_rwkv.data.shard_set import open_shard_set
from streaming_rwkv.shards import (
    FORMAT,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardRecord,
    StreamRecord,
    TokenizerRecord,
    columns,
    read_manifest,
)
from tests.source_counts import counts_of

STREAMS, PACKS, PACKS_PER_SHARD = 100, 100_000, 2_000  # 64 MB of 8192 tokens in uint32, or twice that in uint16
BATCH_PACKS = 512
STAGES = [
    {"tokens": 20_000_000_000, "temperature": 2.0},
    {"passes": 1.0},
    {"tokens": 9_000_000_000, "min_length": 1025},
]


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Yield a list whose only item is the number of calls, of Python and C functions, that this thread makes."""
    calls = [0]

    def count(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            calls[0] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def index_of(stream: int) -> bytes:
    """An MDS index as prep and MDSWriter write it."""
    form = columns(vocab_size=65_536)
    entries = [
        {
            "version": 2,
            "format": "mds",
            "compression": "zstd:3",
            "hashes": ["sha256"],
            "size_limit": 1 << 26,
            "column_names": list(form),
            "column_encodings": list(form.values()),
            "column_sizes": [None] * len(form),
            "raw_data": {
                "basename": f"shard.{i:05}.mds",
                "bytes": 60_000_000,
                "hashes": {"sha256": f"raw/{stream}/{i}"},
            },
            "zip_data": {
                "basename": f"shard.{i:05}.mds.zstd",
                "bytes": 30_000_000,
                "hashes": {"sha256": f"{stream}/{i}"},
            },
            "samples": PACKS_PER_SHARD,
        }
        for i in range(PACKS // PACKS_PER_SHARD)
    ]
    return json.dumps({"version": 2, "shards": entries}).encode()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    records = []
    for stream in range(STREAMS):
        source, bucket = divmod(stream, 8)
        content = index_of(stream)
        record = StreamRecord(
            split="train",
            source=f"source-{source:02}",
            lower=256 * bucket + 1,
            upper=256 * bucket + 256,
            documents=PACKS,
            pieces=PACKS,
            targets=PACKS * (8000 + stream),
            bytes=PACKS,
            packs=PACKS,
            index_sha256=hashlib.sha256(content).hexdigest(),
            shards=[
                ShardRecord(
                    basename=f"shard.{i:05}.mds.zstd",
                    bytes=30_000_000,
                    sha256=f"{stream}/{i}",
                    raw_bytes=60_000_000,
                    raw_sha256=f"raw/{stream}/{i}",
                    packs=PACKS_PER_SHARD,
                )
                for i in range(PACKS // PACKS_PER_SHARD)
            ],
        )
        path = folder / record.path
        path.mkdir(parents=True)
        (path / INDEX_NAME).write_bytes(content)
        records.append(record)
    manifest = Manifest(
        format=FORMAT,
        pack_tokens=8192,
        edges=[256 * (b + 1) for b in range(8)],
        tokenizer=TokenizerRecord(
            kind="rwkv-world", name="world", sha256="0" * 64, vocab_size=65_536, bos_id=0, eos_id=0
        ),
        config={},
        counts=counts_of(records),
        streams=records,
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return folder


def plan_of(records):
    stages = [StageConfig(**stage) for stage in STAGES]
    return make_plan(stages, records, batch_packs=BATCH_PACKS, seed=1, block_shards=4)


@pytest.mark.parametrize("start", [0, 15_000], ids=["start", "resume"])
def test_opening_ten_million_packs_does_not_walk_through_them(large, tmp_path, start):
    with counted_calls() as calls:
        shard_set = open_shard_set(large, cache=tmp_path / "cache", splits=("train",), timeout_seconds=60, fetch=True)
        records = shard_set.manifest.select("train")
        plan = plan_of(records)
        dataset = PackDataset(
            shard_set,
            records,
            batches=plan.packs,
            num_batches=plan.steps,
            batch_packs=BATCH_PACKS,
            options=LoaderOptions(fetch_ahead=512, cache_limit="100gb", download_attempts=1, timeout_seconds=60),
        )
        dataset.start_at(start)
        first = next(dataset._ids())
    assert dataset.num_samples == STREAMS * PACKS
    assert plan.steps > start
    assert first == plan.packs(start, start + 1)[0, 0]
    assert calls[0] < STREAMS * PACKS / 2  # some hundred for each of 5,000 shards
    shard_set.lock.release()
    dataset.close()


def test_a_step_is_found_without_the_steps_before_it(large):
    plan = plan_of(read_manifest(large).select("train"))
    rng = np.random.default_rng(0)
    for step in [0, plan.steps - 2, *rng.integers(0, plan.steps - 1, 8).tolist()]:
        with counted_calls() as calls:
            share = share_of_batches(
                plan.packs, start=step, stop=plan.steps, batch_packs=BATCH_PACKS, rank=3, ranks=8, worker=1, workers=2
            )
            first = next(share)
        assert first == plan.packs(step + 1, step + 2)[0, 3 * BATCH_PACKS // 8]
        assert calls[0] < plan.steps, plan.steps


def test_the_order_takes_few_calls_for_each_pack(large):
    plan = plan_of(read_manifest(large).select("train"))
    share = share_of_batches(
        plan.packs, start=5_000, stop=plan.steps, batch_packs=BATCH_PACKS, rank=0, ranks=1, worker=0, workers=1
    )
    packs = 200_000
    with counted_calls() as calls:
        for _ in range(packs):
            next(share)
    assert calls[0] < 10 * packs
