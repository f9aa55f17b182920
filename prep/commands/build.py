"""`prepare`: a recipe to a data set, or with `--dry-run` to a count of its documents and tokens."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from prep.build import build
from prep.commands.dry_run import count, count_table, estimate
from prep.commands.tables import fitting, print_data_set
from prep.config import PrepConfig
from prep.execution.progress import observing
from streaming_rwkv.config import load_config
from streaming_rwkv.console import LOG_COLUMNS, shown
from streaming_rwkv.location import is_remote
from streaming_rwkv.version import PROGRAM


def run(options: argparse.Namespace) -> int:
    """Build or count, showing progress, and print the result; return the exit status."""
    config = load_config(PrepConfig, options.config, overrides=options.overrides)
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)  # a log file has no width of its own
    if options.dry_run:
        _count(config, console, by=options.by, accept_changes=options.accept_changes)
        return 0
    started = time.monotonic()
    if is_remote(config.out):
        print(f"{config.out}: unfinished work is kept in {config.folder} (work=…)")
    with observing(console) as observer:
        built = build(config, observer=observer, fork=True, accept_changes=options.accept_changes)
    manifest, out = built.manifest, shown(config.out)
    print_data_set(manifest, console, by=options.by)
    fingerprint = manifest.fingerprint[:16]
    if built.was_finished:
        print(f"{out}: already finished, nothing to do; fingerprint {fingerprint}")
    else:
        text_bytes = sum(stream.bytes for stream in manifest.streams)
        seconds = time.monotonic() - started
        rate = f"{text_bytes / 1e6 / seconds:.1f} MB/s"
        print(f"{out}: {text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s, {rate}; fingerprint {fingerprint}")
    print(f"next: `{PROGRAM} inspect {out}` shows documents, `{PROGRAM} train YAML data.path={out}` trains")
    return 0


def _count(config: PrepConfig, console: Console, *, by: str, accept_changes: bool) -> None:
    started = time.monotonic()
    with observing(console, are_listed=False) as observer:
        counts = count(config, observer=observer, accept_changes=accept_changes)
    seconds = time.monotonic() - started
    console.print(fitting(console, lambda number: count_table(counts.records, config, by=by, number=number)))
    for line in estimate(counts, config, seconds=seconds):
        console.print(shown(line), markup=False, highlight=False, soft_wrap=True)
