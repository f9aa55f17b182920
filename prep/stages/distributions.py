"""The statistics of a data set: distributions for `report`, in a file beside the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from prep.stages.records import FILL_BINS, LENGTHS_PER_DOUBLING, PackedWindow, UnitRecord
from streaming_rwkv.config import Config


class SourceStatistics(Config):
    """The text and documents read from one source, duplicates included."""

    text_bytes: int
    lengths: dict[int, int]
    """Documents by floor(LENGTHS_PER_DOUBLING * log2(length))."""


class Statistics(Config):
    """Distributions of document lengths and of pack fill."""

    lengths_per_doubling: int
    fill_bins: int
    sources: dict[str, SourceStatistics]
    fill: dict[str, list[int]]
    """Return the number of packs by how full they are, in `fill_bins` equal steps, for each stream."""


def statistics_bytes(units: Sequence[UnitRecord], windows: Iterable[PackedWindow]) -> bytes:
    """Return the canonical content of statistics.json."""
    lengths: dict[str, Counter[int]] = {}
    text_bytes: Counter[str] = Counter()
    for unit in units:
        lengths.setdefault(unit.source, Counter()).update(unit.lengths)
        text_bytes[unit.source] += unit.text_bytes
    fill: dict[str, list[int]] = {}
    for window, record in windows:
        so_far = fill.setdefault(window.stream, [0] * FILL_BINS)
        fill[window.stream] = [left + right for left, right in zip(so_far, record.fill, strict=True)]
    statistics = Statistics(
        lengths_per_doubling=LENGTHS_PER_DOUBLING,
        fill_bins=FILL_BINS,
        sources={
            source: SourceStatistics(text_bytes=text_bytes[source], lengths=dict(sorted(counts.items())))
            for source, counts in sorted(lengths.items())
        },
        fill=fill,
    )
    return (json.dumps(statistics.model_dump(), indent=1, sort_keys=True) + "\n").encode()
