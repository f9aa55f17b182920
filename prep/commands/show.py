"""`show`: the tables of a finished data set."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from prep.commands.tables import print_data_set
from prep.dataset.finished import open_data_set
from streaming_rwkv.console import LOG_COLUMNS, shown


def run(options: argparse.Namespace) -> int:
    """Print the tables of a data set; return the exit status."""
    with open_data_set(options.out) as data_set:
        manifest = data_set.manifest()
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    print_data_set(manifest, console, by=options.by)
    text_bytes = sum(stream.bytes for stream in manifest.streams)
    shard_bytes = sum(shard.bytes for stream in manifest.streams for shard in stream.shards)
    print(
        shown(
            f"{options.out}: {text_bytes / 1e6:,.1f} MB of text, {shard_bytes / 1e6:,.1f} MB of shards; "
            f"tokenizer {manifest.tokenizer.name}; fingerprint {manifest.fingerprint[:16]}"
        )
    )
    return 0
