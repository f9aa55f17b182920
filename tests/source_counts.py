"""The counts of a manifest for streams that were written without `prep`."""

from __future__ import annotations

from collections.abc import Sequence

from streaming_rwkv.shards import SPLITS, SourceCounts, StreamRecord


def counts_of(streams: Sequence[StreamRecord]) -> dict[str, SourceCounts]:
    """Return the counts of each source if all that was read is in the streams."""
    counts = {}
    for source in sorted({stream.source for stream in streams}):
        of_source = [stream for stream in streams if stream.source == source]
        documents, targets = (
            {split: sum(getattr(stream, name) for stream in of_source if stream.split == split) for split in SPLITS}
            for name in ("documents", "targets")
        )
        counts[source] = SourceCounts(
            documents_read=sum(documents.values()),
            documents=documents,
            duplicates=0,
            rejected={},
            targets_read=sum(targets.values()),
            targets=targets,
            targets_cut=0,
        )
    return counts
