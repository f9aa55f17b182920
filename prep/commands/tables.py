"""Tables that `build` prints at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from streaming_rwkv.console import shown
from streaming_rwkv.shards import Manifest


def stream_table(manifest: Manifest) -> Table:
    """Return a table of documents, tokens, packs and fill of each stream."""
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


def document_table(manifest: Manifest) -> Table:
    """Return a table of the documents of each source: read, written, duplicate and rejected."""
    table = Table("source", title="documents")
    for column in ("read", "train", "validation", "duplicates", "rejected"):
        table.add_column(column, justify="right")
    for source, counts in manifest.counts.items():
        numbers = (counts.documents_read, *counts.documents.values(), counts.duplicates)
        table.add_row(source, *(f"{number:,}" for number in numbers), rejected_cell(counts.rejected))
    return table


def rejected_cell(counts: Mapping[str, int]) -> str:
    """Return the text of a table cell for the rejected documents by reason."""
    return ", ".join(f"{count:,} {shown(reason)}" for reason, count in counts.items()) or "0"
