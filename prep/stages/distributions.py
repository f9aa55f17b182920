"""The statistics of a data set: distributions for `report`, in a file beside the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from prep.stages.records import FILL_BINS, LENGTHS_PER_DOUBLING, PackedWindow, UnitRecord
from streaming_rwkv.config import Config, ConfigError, validate
from streaming_rwkv.shards import DataError

_LARGEST_STEPS = 1000  # of a distribution, more than a page has room for
_MOST_DOUBLINGS = 64
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class SourceStatistics(Config):
    """The text and documents read from one source, duplicates included."""

    text_bytes: Count
    lengths: dict[Count, Count]
    """Documents by floor(LENGTHS_PER_DOUBLING * log2(length))."""


class Statistics(Config):
    """Distributions of document lengths and of pack fill."""

    lengths_per_doubling: int = Field(ge=1, le=_LARGEST_STEPS)
    fill_bins: int = Field(ge=1, le=_LARGEST_STEPS)
    sources: dict[str, SourceStatistics]
    fill: dict[str, list[Count]]
    """The number of packs by how full they are, in `fill_bins` equal steps, for each stream."""

    @model_validator(mode="after")
    def _has_as_many_steps_as_it_says(self) -> Statistics:
        for stream, counts in self.fill.items():
            if len(counts) != self.fill_bins:
                raise ValueError(f"fill.{stream}: found {len(counts)} steps, but fill_bins is {self.fill_bins}")
        for source, of_source in self.sources.items():
            if (longest := max(of_source.lengths, default=0)) > _MOST_DOUBLINGS * self.lengths_per_doubling:
                raise ValueError(f"sources.{source}.lengths: found the step {longest}, no document is that long")
        return self


def parse_statistics(content: bytes, *, where: str) -> Statistics:
    """Parse and check the content of a statistics.json.

    Raises:
        DataError: not JSON, or a field that is missing, unknown or wrong.
    """
    try:
        values = json.loads(content)
        json.dumps(values, ensure_ascii=False).encode()
        return validate(Statistics, values, where=where)
    except ConfigError as error:
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:  # half a surrogate pair is no text
        raise DataError(f"{where}: not valid JSON ({error}); copy it from where the data set was built") from None


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
