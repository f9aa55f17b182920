"""Tables of a data set, as `build` and `show` print them: numbers are never cut, whatever the width of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from streaming_rwkv.console import shown
from streaming_rwkv.shards import Manifest, StreamRecord

FEW_DOCUMENTS = 100  # too few to train on
GROUPINGS = ("source", "bucket")

Format = Callable[[int], str]


def print_data_set(manifest: Manifest, console: Console, *, by: str = "source") -> None:
    """Print the tables of a data set, and warnings about it."""
    console.print(fitting(console, lambda number: stream_table(manifest, by=by, number=number)))
    console.print(fitting(console, lambda number: document_table(manifest, number=number)))
    for line in data_set_warnings(manifest):
        console.print(f"warning: {shown(line)}", markup=False, highlight=False, soft_wrap=True)


def fitting(console: Console, table: Callable[[Format], Table]) -> Table:
    """Return the table with whole numbers if the console is wide enough, and otherwise with short ones."""
    whole = table(grouped)
    is_wide = Measurement.get(console, console.options.update(max_width=10_000), whole).minimum <= console.width
    return whole if is_wide else table(short)


def grouped(number: int) -> str:
    """Return a number with its digits in groups of three."""
    return f"{number:,}"


def short(number: int) -> str:
    """Return a number with at most four digits and a unit: 25.7 M."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= limit:
            scale = min(limit, 10**3) if unit == "k" else limit
            return f"{number / scale:.1f} {unit}"
    return f"{number:,}"


def stream_table(manifest: Manifest, *, by: str = "source", number: Format = grouped) -> Table:
    """Return a table of documents, tokens, packs and fill of the training split, and the tokens of validation.

    Args:
        by: `source` for a row for each source, `bucket` for a row for each bucket of each source.
    """
    has_buckets = by == "bucket"
    table = number_table(
        f"training data, in packs of {manifest.pack_tokens:,} tokens",
        names=["source", *(["bucket"] if has_buckets else [])],
        numbers=["documents", *(["pieces"] if has_buckets else []), "tokens", "packs", "fill", "validation"],
    )
    fields = ["documents", *(["pieces"] if has_buckets else []), "targets", "packs"]

    def cells(streams: Sequence[StreamRecord]) -> Iterator[str]:
        train = [stream for stream in streams if stream.split == "train"]
        yield from (number(sum(getattr(stream, field) for stream in train)) for field in fields)
        yield f"{_fill(train, manifest.pack_tokens):.1%}"
        yield number(sum(stream.targets for stream in streams if stream.split != "train"))

    rows = []
    by_source = sorted(manifest.streams, key=lambda stream: (stream.source, stream.lower))
    for source, group in groupby(by_source, key=lambda stream: stream.source):
        of_source = list(group)
        if has_buckets:
            for bucket, of_bucket in groupby(of_source, key=lambda stream: stream.bucket):
                rows.append([source, bucket, *cells(list(of_bucket))])
        rows.append([source, *(["all"] if has_buckets else []), *cells(of_source)])
        if has_buckets:
            rows.append([])
    total = ["all", *([""] if has_buckets else []), *cells(manifest.streams)]
    return with_rows(table, [*rows, *([] if has_buckets else [[]]), total])


def document_table(manifest: Manifest, *, number: Format = grouped) -> Table:
    """Return a table of the documents of each source: read, written, duplicate and rejected."""
    table = number_table(
        "documents", names=["source"], numbers=["read", "train", "validation", "duplicates"], texts=["rejected"]
    )
    rows = [
        [
            source,
            *map(number, (counts.documents_read, *counts.documents.values(), counts.duplicates)),
            rejected_cell(counts.rejected),
        ]
        for source, counts in manifest.counts.items()
    ]
    return with_rows(table, rows)


def rejected_cell(counts: Mapping[str, int]) -> str:
    """Return the text of a table cell for the rejected documents by reason."""
    return ", ".join(f"{count:,} {shown(reason)}" for reason, count in counts.items()) or "0"


def number_table(title: str, *, names: Iterable[str], numbers: Iterable[str], texts: Iterable[str] = ()) -> Table:
    """Return an empty table whose names may wrap and whose numbers may not."""
    table = Table(title=title)
    for name in names:
        table.add_column(name, overflow="fold", min_width=8 if name == "source" else None, no_wrap=name != "source")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for name in texts:
        table.add_column(name, justify="right", overflow="fold", min_width=len(name))
    return table


def with_rows(table: Table, rows: Iterable[Sequence[str]]) -> Table:
    """Add rows to a table; an empty one is a line between sections."""
    for row in rows:
        if not row:
            table.add_section()
            continue
        for column, cell in zip(table.columns, row, strict=True):
            if column.no_wrap:  # rich would cut it otherwise
                column.min_width = max(column.min_width or 0, len(cell))
        table.add_row(*row)
    return table


def data_set_warnings(manifest: Manifest) -> list[str]:
    """Return what makes a data set unfit to train on, in a line each."""
    documents = sum(stream.documents for stream in manifest.streams)
    tokens = sum(stream.targets for stream in manifest.streams)
    lines = []
    if documents < FEW_DOCUMENTS:
        lines.append(f"{documents:,} documents of {tokens:,} tokens: enough to try the commands, not to train a model")
    share = manifest.config.get("validation", 0)
    if share and not any(stream.split == "validation" for stream in manifest.streams):
        lines.append(
            f"no validation packs: validation={share:g} of so few documents is none, and a run on this data set cannot "
            "measure a validation loss; build with a larger `validation` in another `out`"
        )
    return lines


def _fill(streams: Iterable[StreamRecord], pack_tokens: int) -> float:
    streams = list(streams)
    packs = sum(stream.packs for stream in streams)
    return sum(stream.targets for stream in streams) / (packs * pack_tokens) if packs else 0.0
