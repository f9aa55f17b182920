"""`upload`: a finished data set to object storage."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from prep.dataset.upload import upload
from prep.execution.progress import observing


def run(options: argparse.Namespace) -> int:
    """Upload, showing progress, and print the result; return the exit status."""
    started = time.monotonic()
    with observing(Console(width=None if sys.stdout.isatty() else 140)) as observer:
        uploaded = upload(options.folder, options.to, observer=observer)
    fingerprint = uploaded.manifest.fingerprint[:16]
    if uploaded.was_there:
        print(f"{options.to}: already uploaded, nothing to do; fingerprint {fingerprint}")
        return 0
    size = sum(shard.bytes for stream in uploaded.manifest.streams for shard in stream.shards) / 1e6
    seconds = time.monotonic() - started
    rate = f"{size:,.1f} MB of shards in {seconds:.1f} s, {size / seconds:.1f} MB/s"
    print(f"{options.to}: {rate}; fingerprint {fingerprint}")
    return 0
