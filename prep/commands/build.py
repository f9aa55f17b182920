"""`build`: a recipe to a data set, or with `--dry-run` to a count of its documents and tokens."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from prep.build import build
from prep.commands.dry_run import count, count_table
from prep.commands.tables import document_table, stream_table
from prep.config import PrepConfig
from prep.execution.progress import observing
from streaming_rwkv.config import load_config
from streaming_rwkv.location import is_remote


def run(options: argparse.Namespace) -> int:
    """Build or count, showing progress, and print the result; return the exit status."""
    config = load_config(PrepConfig, options.config, overrides=options.overrides)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a log file has no width of its own
    started = time.monotonic()
    if options.dry_run:
        with observing(console, are_listed=False) as observer:
            records = count(config, observer=observer)
        console.print(count_table(records, config.edges))
        return 0
    if is_remote(config.out):
        print(f"{config.out}: unfinished work is kept in {config.folder} (work=…)")
    with observing(console) as observer:
        built = build(config, observer=observer, fork=True, accept_changes=options.accept_changes)
    manifest = built.manifest
    if built.was_finished:
        print(f"{config.out}: already finished, nothing to do; fingerprint {manifest.fingerprint[:16]}")
        return 0
    console.print(stream_table(manifest))
    console.print(document_table(manifest))
    text_bytes = sum(stream.bytes for stream in manifest.streams)
    seconds = time.monotonic() - started
    print(
        f"{config.out}: {text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s; "
        f"fingerprint {manifest.fingerprint[:16]}"
    )
    return 0
