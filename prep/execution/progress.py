"""What a build shows while it runs, and the table at its end."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from prep.document import Rejection
from prep.execution.observer import Observer
from prep.stages import tokenization as units
from streaming_rwkv.console import shown
from streaming_rwkv.shards import Manifest, bucket_bounds, bucket_name

_REJECTIONS_SHOWN = 5
_SECONDS_BETWEEN_LINES = 10
_ALL = ""  # no source is called so


class ConsoleObserver(Observer):
    """A bar for each source on a terminal, a line now and then elsewhere, and the first rejections of each reason."""

    def __init__(self, console: Console, bars: Progress, *, are_listed: bool) -> None:
        self._console = console
        self._further = "are listed in rejected.jsonl only" if are_listed else "are counted only"
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._name = "starting"
        self._started = self._said = time.monotonic()
        self._read: dict[str, Counter[str]] = defaultdict(Counter)
        self._rejections: Counter[str] = Counter()
        self._in_bytes = False
        self._done: Counter[str] = Counter()

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        self._name, self._started = name, time.monotonic()
        self._in_bytes, self._done = in_bytes, Counter()
        if self._console.is_terminal:
            self._bars.start()  # not before: it starts a thread, and workers may be forked until now
        for task in self._tasks.values():
            self._bars.remove_task(task)
        named = {source: total for source, total in totals.items() if total}
        self._tasks = {
            source: self._bars.add_task(f"{name} {source}", total=total, speed="") for source, total in named.items()
        }
        if len(named) != 1:
            self._tasks[_ALL] = self._bars.add_task(name, total=sum(named.values()), speed="")

    def done(self, source: str, amount: int) -> None:
        for name in (source, _ALL):
            self._done[name] += amount
            if name in self._tasks:
                self._bars.advance(self._tasks[name], amount)
                if self._in_bytes:
                    seconds = max(time.monotonic() - self._started, 1e-3)
                    rate = f"{self._done[name] / 1e6:,.1f} MB, {self._done[name] / 1e6 / seconds:.1f} MB/s"
                    self._bars.update(self._tasks[name], speed=rate)
        self._say()

    def progress(self, progress: units.Progress) -> None:
        amounts = {"documents": progress.documents, "text_bytes": progress.text_bytes, "tokens": progress.tokens}
        for name in (progress.source, _ALL):
            self._read[name].update(amounts)
            if name in self._tasks:
                self._bars.update(self._tasks[name], speed=self._speed(name))
        self._say()

    def rejection(self, rejection: Rejection) -> None:
        self._rejections[rejection.reason] += 1
        seen = self._rejections[rejection.reason]
        if seen <= _REJECTIONS_SHOWN:
            more = f"; further ones {self._further}" if seen == _REJECTIONS_SHOWN else ""
            self._print(f"left out: {rejection.source}: {rejection}{more}")

    def _speed(self, name: str) -> str:
        read, seconds = self._read[name], max(time.monotonic() - self._started, 1e-3)
        return (
            f"{read['documents']:,} documents {read['text_bytes'] / 1e6 / seconds:.1f} MB/s "
            f"{read['tokens'] / 1e6 / seconds:.2f} M tokens/s"
        )

    def _say(self) -> None:
        if self._console.is_terminal or time.monotonic() - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = time.monotonic()
        whole = self._bars.tasks[-1]
        left = f", {whole.time_remaining:.0f} s left" if whole.time_remaining is not None else ""
        self._print(f"{self._name}: {whole.percentage:.0f} %{left}; {whole.fields['speed']}")

    def _print(self, line: str) -> None:
        self._console.print(shown(line), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def observing(console: Console, *, are_listed: bool = True) -> Iterator[ConsoleObserver]:
    """An observer that shows on `console`.

    Args:
        are_listed: whether rejected documents are also written to rejected.jsonl.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        yield ConsoleObserver(console, bars, are_listed=are_listed)
    finally:
        if console.is_terminal:
            bars.stop()


def stream_table(manifest: Manifest) -> Table:
    """Source × bucket: documents, tokens, packs, fill."""
    table = Table(title=f"packs of {manifest.pack_tokens} tokens")
    for name in ("split", "source", "bucket"):
        table.add_column(name, no_wrap=True)
    for column in ("documents", "pieces", "tokens", "packs", "fill"):
        table.add_column(column, justify="right")
    for stream in manifest.streams:
        _add_row(table, [stream.split, stream.source, stream.bucket], manifest, [stream])
    table.add_section()
    _add_row(table, ["all", "", ""], manifest, manifest.streams)
    return table


def _add_row(table: Table, names: list[str], manifest: Manifest, streams: Sequence[object]) -> None:
    def total(field: str) -> int:
        return int(sum(getattr(stream, field) for stream in streams))

    fill = total("targets") / max(1, total("packs") * manifest.pack_tokens)
    counts = [f"{total(field):,}" for field in ("documents", "pieces", "targets", "packs")]
    table.add_row(*names, *counts, f"{fill:.1%}")


def books_table(manifest: Manifest) -> Table:
    """Where every document went."""
    table = Table("source", title="documents")
    for column in ("read", "train", "validation", "duplicates", "rejected"):
        table.add_column(column, justify="right")
    for source, books in manifest.books.items():
        counts = (books.documents_read, *books.documents.values(), books.duplicates)
        table.add_row(source, *(f"{count:,}" for count in counts), _rejected(books.rejected))
    return table


def _rejected(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {shown(reason)}" for reason, count in counts.items()) or "0"


def count_table(records: Sequence[units.UnitRecord], edges: Sequence[int]) -> Table:
    """Source × bucket of a dry run, and all of each source; duplicates included, both splits together."""
    table = Table("source", "bucket", title="dry run: duplicates are still counted, nothing was written")
    for column in ("documents", "pieces", "tokens", "rejected"):
        table.add_column(column, justify="right")
    names = [bucket_name(*bounds) for bounds in bucket_bounds(edges)]
    for source, members in itertools.groupby(records, key=lambda record: record.source):
        of_source = list(members)
        counts = sum(np.array(record.streams).reshape(-1, len(names), 3).sum(axis=0) for record in of_source)
        for name, of_bucket in zip(names, counts.tolist(), strict=True):
            if any(of_bucket):
                table.add_row(source, name, *(f"{count:,}" for count in of_bucket))
        rejected = sum((Counter(record.rejected) for record in of_source), Counter[str]())
        totals = (f"{count:,}" for count in counts.sum(axis=0).tolist())
        table.add_row(source, "all", *totals, _rejected(dict(sorted(rejected.items()))))
        table.add_section()
    return table
