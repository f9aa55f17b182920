"""`verify`: every shard of a data set checked against its manifest."""

from __future__ import annotations

import argparse
import time

from prep.dataset.verification import verify
from streaming_rwkv.console import shown, shown_bytes


def run(options: argparse.Namespace) -> int:
    """Verify a data set and print the result; return the exit status."""
    started = time.monotonic()
    manifest = verify(options.out)
    packs = sum(stream.packs for stream in manifest.streams)
    size = sum(shard.bytes for stream in manifest.streams for shard in stream.shards)
    print(
        f"{shown(options.out)}: OK; {len(manifest.streams)} streams, {packs:,} packs, {shown_bytes(size)} of shards in "
        f"{time.monotonic() - started:.1f} s; fingerprint {manifest.fingerprint[:16]}"
    )
    return 0
