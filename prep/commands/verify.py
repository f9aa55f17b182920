"""`verify`: every shard of a data set checked against its manifest."""

from __future__ import annotations

import argparse

from prep.dataset.verification import verify


def run(options: argparse.Namespace) -> int:
    """Verify a data set and print the result; return the exit status."""
    manifest = verify(options.out)
    packs = sum(stream.packs for stream in manifest.streams)
    print(f"{options.out}: OK; {len(manifest.streams)} streams, {packs:,} packs, {manifest.fingerprint}")
    return 0
