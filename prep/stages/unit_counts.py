"""Sums over the tokenized chunks of a unit."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.document import LineCounts, Rejection, add_counts
from prep.execution.intermediate import Block, SortedPieces
from prep.inputs.files import Unit
from prep.stages.records import LENGTHS_PER_DOUBLING, StreamCount, UnitRecord
from streaming_rwkv.shards import offsets_of


@dataclass(frozen=True, kw_only=True)
class TokenizedChunk:
    """N tokenized documents of a unit."""

    first: int  # the first document's number in the unit
    pieces: SortedPieces
    hashes: NDArray[np.uint64]  # (N, 2)
    inputs: NDArray[np.int64]  # (N,)
    text_bytes: int
    read: int
    targets_cut: int
    rejections: list[Rejection]
    line_counts: dict[str, LineCounts]


class UnitCounter:
    """Sums over the chunks of a unit."""

    def __init__(self, unit: Unit, *, streams: int) -> None:
        self._source = unit.source
        self._cut_files = {part.file.name for part in unit.parts if part.is_cut}
        self._line_counts: dict[str, LineCounts] = {}
        self._documents_read = self._documents = self._text_bytes = self._targets_read = self._targets_cut = 0
        self._rejected: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._counts = np.zeros((streams, 3), np.int64)  # documents, pieces, targets

    def add(self, chunk: TokenizedChunk) -> None:
        self._documents_read += chunk.read
        self._documents += len(chunk.inputs)
        self._text_bytes += chunk.text_bytes
        self._targets_read += int(chunk.inputs.sum())
        self._targets_cut += chunk.targets_cut
        self._rejected.update(rejection.reason for rejection in chunk.rejections)
        of_cut = ((name, counts) for name, counts in chunk.line_counts.items() if name in self._cut_files)
        self._line_counts = add_counts(itertools.chain(self._line_counts.items(), of_cut))
        bins, counts = np.unique(np.floor(LENGTHS_PER_DOUBLING * np.log2(chunk.inputs)), return_counts=True)
        self._lengths.update(dict(zip(bins.astype(int).tolist(), counts.tolist(), strict=True)))
        columns, bounds = chunk.pieces.columns, chunk.pieces.bounds
        of_each = (columns["starts"] == 0, np.ones_like(columns["starts"]), columns["lengths"] - 1)
        for column, values in enumerate(of_each):
            self._counts[:, column] += np.diff(offsets_of(values)[bounds])

    def record(self, *, files: dict[str, Any], blocks: list[Block], hash_runs: list[int]) -> UnitRecord:
        """Return the unit's record, with what was written for it."""
        return UnitRecord(
            files=files,
            source=self._source,
            documents_read=self._documents_read,
            documents=self._documents,
            rejected=dict(sorted(self._rejected.items())),
            text_bytes=self._text_bytes,
            targets_read=self._targets_read,
            targets_cut=self._targets_cut,
            streams=[
                StreamCount(documents=documents, pieces=pieces, targets=targets)
                for documents, pieces, targets in self._counts.tolist()
            ],
            blocks=blocks,
            hash_runs=hash_runs,
            lengths=dict(sorted(self._lengths.items())),
            line_counts=self._line_counts,
        )
