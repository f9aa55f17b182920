"""Distributions that the manifest is too small for, kept beside it for `report`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from prep.stages.packing import FILL_BINS, Window, WindowRecord
from prep.stages.tokenization import LENGTHS_PER_DOUBLING, UnitRecord
from streaming_rwkv.config import Config

STATISTICS_NAME = "statistics.json"


class SourceStatistics(Config):
    """What was read of one source, duplicates included."""

    text_bytes: int
    lengths: dict[int, int]
    """Documents by floor(LENGTHS_PER_DOUBLING * log2(length))."""


class Statistics(Config):
    lengths_per_doubling: int
    fill_bins: int
    sources: dict[str, SourceStatistics]
    fill: dict[str, list[int]]
    """By stream: packs by how full they are, in `fill_bins` equal steps."""


def statistics_bytes(units: Sequence[UnitRecord], windows: Iterable[tuple[Window, WindowRecord]]) -> bytes:
    """The canonical content of statistics.json."""
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
