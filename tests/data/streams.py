"""Streams that exist in the manifest alone: what order and mixture look at."""

from __future__ import annotations

from streaming_rwkv.shards import ShardRecord, StreamRecord


def stream(
    source: str, upper: int, packs: int, *, targets_per_pack: int = 100, packs_per_shard: int = 10
) -> StreamRecord:
    sizes = [min(packs_per_shard, packs - first) for first in range(0, packs, packs_per_shard)]
    return StreamRecord(
        split="train",
        source=source,
        lower=upper - 255,
        upper=upper,
        documents=packs,
        pieces=packs,
        targets=packs * targets_per_pack,
        bytes=1,
        packs=packs,
        index_sha256="",
        shards=[
            ShardRecord(basename=f"{i}", bytes=1, sha256="", raw_bytes=1, raw_sha256="", packs=n)
            for i, n in enumerate(sizes)
        ],
    )
