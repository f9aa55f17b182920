"""Documents: their texts, stable keys, content hashes and splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A document that cannot be used, with its place and the reason."""

    source: str
    file: str
    row: int  # from 0: a line of a JSON file, a row of a parquet file
    reason: str
    is_requested: bool = False  # by the recipe or a hook; False for a broken document

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}: {self.reason}"


class LineCounts(NamedTuple):
    """Counts of the lines of a file, or of a part of it."""

    lines: int  # without blank ones
    not_objects: int

    def plus(self, other: LineCounts) -> LineCounts:
        return LineCounts(self.lines + other.lines, self.not_objects + other.not_objects)

    @property
    def are_json_lines(self) -> bool:
        """True if at least half of them are JSON objects."""
        return 2 * self.not_objects <= self.lines


def add_counts(counts: Iterable[tuple[str, LineCounts]]) -> dict[str, LineCounts]:
    """Add up counts by file name."""
    sums: dict[str, LineCounts] = {}
    for name, of_part in counts:
        sums[name] = sums.get(name, LineCounts(0, 0)).plus(of_part)
    return sums


@dataclass(frozen=True, kw_only=True)
class Documents:
    """N documents as a reader yields them, in the order of the input."""

    source: str
    texts: list[str]
    keys: NDArray[np.uint64]  # (N,)
    rows: NDArray[np.int64]  # (N,) the row of each in its file
    files: list[str]  # names of the files
    file_of: NDArray[np.int64]  # (N,) index into `files`
    rejections: list[Rejection]  # rows that were read but cannot be used
    line_counts: dict[str, LineCounts]  # by file; for a parquet file, counts of its rows
    input_bytes: int = 0  # about the amount of input that they are from

    @property
    def read(self) -> int:
        return len(self.texts) + len(self.rejections)

    def without(self, reasons: dict[int, str], *, is_requested: bool = False) -> Documents:
        """Return the documents without those at the given indices, which become rejections with these reasons."""
        kept = [index for index in range(len(self.texts)) if index not in reasons]
        rejections = [
            Rejection(
                source=self.source,
                file=self.files[self.file_of[index]],
                row=int(self.rows[index]),
                reason=reason,
                is_requested=is_requested,
            )
            for index, reason in sorted(reasons.items())
        ]
        return replace(
            self,
            texts=[self.texts[index] for index in kept],
            keys=self.keys[kept],
            rows=self.rows[kept],
            file_of=self.file_of[kept],
            rejections=[*self.rejections, *rejections],
        )


def document_keys(source: str, file: str, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return (N,) 64-bit hashes of (source, file, row), which are the same in every build.

    `file` is relative to the source's folder, so moving a corpus does not change keys.
    """
    return mix(rows.astype(np.uint64), seed=xxhash.xxh3_64_intdigest(f"{source}\0{file}".encode()))


def mix(values: NDArray[np.uint64], *, seed: int) -> NDArray[np.uint64]:
    """Return SplitMix64 of each value: a seeded, random-looking bijection of 64 bits."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def content_hashes(encoded: Sequence[bytes], *, seed: int) -> NDArray[np.uint64]:
    """Return (N, 2) the 128-bit XXH3 of each encoded text, as two 64-bit numbers."""
    digest = xxhash.xxh3_128_digest
    joined = b"".join([digest(text, seed) for text in encoded])
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def in_validation(hashes: NDArray[np.uint64], *, fraction: float) -> NDArray[np.bool_]:
    """Return (N,) True for documents of the validation split.

    Only the text decides: a document keeps its split in any order, with any number of workers and when files are added,
    and equal texts are in the same split.
    """
    return hashes[:, 0] < np.uint64(int(fraction * 2**64))
