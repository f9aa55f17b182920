"""Exact deduplication in bounded memory: hashes in ranges, each small enough to sort.

Of documents with equal text the first in canonical order is kept (sources by name, files by name, rows). All of a
range's hashes are looked at together, so the result depends on neither workers nor the order of their work. In the end
all ranges become one bit for each document: whoever packs then opens one file, however many ranges there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.execution.context import Job
from prep.execution.intermediate import HASHES_NAME, read_hashes
from prep.execution.task_store import DoneRecord, done_folder, finish, hash_file, load_done, temporary_task_folder
from prep.ragged import offsets_of
from prep.stages.tokenization import Report, UnitRecord, unit_name

_DOCUMENTS_PER_RANGE = 1 << 21  # about 100 MB while they are sorted
_PLACES_AT_ONCE = 1 << 20
_RESULT_NAME = "duplicates.npy"
_JOINED = "all_duplicates"
_FIRST_BYTES_NAME = "first_bytes.npy"  # (units + 1,) where each unit's bits begin
_BITS_NAME = "bits.npy"


@dataclass(frozen=True, kw_only=True)
class HashRange:
    """The documents whose 64 upper bits of the hash lie in [index, index + 1) * 2**64 / ranges."""

    index: int
    ranges: int
    runs: tuple[tuple[int, ...], ...]  # of each unit's hashes.bin; one object for all ranges


class RangeRecord(DoneRecord):
    """Duplicates of one range are listed in its file."""

    duplicates: int


def plan_ranges(units: Sequence[UnitRecord]) -> list[HashRange]:
    ranges = max(1, -(-sum(unit.documents for unit in units) // _DOCUMENTS_PER_RANGE))
    runs = tuple(tuple(unit.hash_runs) for unit in units)
    return [HashRange(index=index, ranges=ranges, runs=runs) for index in range(ranges)]


def _name(index: int) -> str:
    return f"duplicates/{index:06}"


def do_range(job: Job, hash_range: HashRange, report: Report) -> RangeRecord:
    """Find the duplicates of a range, if that is not done yet."""
    name = _name(hash_range.index)
    record = load_done(job.work, name, RangeRecord)
    if record is None:
        duplicates = _find(job, hash_range)
        with temporary_task_folder(job.work) as folder:
            np.save(folder / _RESULT_NAME, duplicates)
            record = RangeRecord(files={_RESULT_NAME: hash_file(folder / _RESULT_NAME)}, duplicates=len(duplicates))
            finish(folder, record, work=job.work, name=name)
    return record


def _find(job: Job, hash_range: HashRange) -> NDArray[np.uint64]:
    """(D,) unit << 32 | document, rising."""
    bounds = [-(-(edge << 64) // hash_range.ranges) for edge in (hash_range.index, hash_range.index + 1)]
    hashes, places = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
    for unit, runs in enumerate(hash_range.runs):
        for run, documents in read_hashes(done_folder(job.work, unit_name(job.units[unit])) / HASHES_NAME, runs):
            begin, end = (
                len(run) if bound >> 64 else int(np.searchsorted(run[:, 0], np.uint64(bound))) for bound in bounds
            )
            hashes.append(np.array(run[begin:end]))  # a copy, or thousands of files would stay mapped
            places.append(documents[begin:end].astype(np.uint64) | np.uint64(unit << 32))
    return first_come(np.concatenate(hashes), np.concatenate(places))


def first_come(hashes: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(D,) the places, rising, of all but the lowest of those with equal (N, 2) hashes."""
    order = np.lexsort((places, hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    repeats = (ordered[1:] == ordered[:-1]).all(axis=1)
    return np.sort(places[order[1:][repeats]])


def join_ranges(job: Job, units: Sequence[UnitRecord], *, ranges: int) -> None:
    """Put the duplicates of all ranges together, if that is not done yet: one bit for each document of each unit."""
    if load_done(job.work, _JOINED, DoneRecord) is not None:
        return
    first_bytes = offsets_of(np.array([-(-unit.documents // 8) for unit in units], np.int64))
    bits = np.zeros(first_bytes[-1], np.uint8)
    for index in range(ranges):
        places = np.load(done_folder(job.work, _name(index)) / _RESULT_NAME, mmap_mode="r")
        for first in range(0, len(places), _PLACES_AT_ONCE):
            some = places[first : first + _PLACES_AT_ONCE]
            documents = some.astype(np.uint32)  # the lower half
            at = first_bytes[(some >> np.uint64(32)).astype(np.int64)] + (documents >> 3)
            np.bitwise_or.at(bits, at, np.left_shift(1, documents & 7).astype(np.uint8))
    with temporary_task_folder(job.work) as folder:
        np.save(folder / _FIRST_BYTES_NAME, first_bytes)
        np.save(folder / _BITS_NAME, bits)
        record = DoneRecord(files={name: hash_file(folder / name) for name in (_FIRST_BYTES_NAME, _BITS_NAME)})
        finish(folder, record, work=job.work, name=_JOINED)


class Duplicates:
    """The duplicates of all ranges, as `join_ranges` left them."""

    def __init__(self, job: Job) -> None:
        folder = done_folder(job.work, _JOINED)
        self._first_bytes = np.load(folder / _FIRST_BYTES_NAME, mmap_mode="r")
        self._bits = np.load(folder / _BITS_NAME, mmap_mode="r")

    def are_among(self, documents: NDArray[np.uint32], *, unit: int) -> NDArray[np.bool_]:
        """(N,) which of a unit's documents are left out."""
        of_unit = self._bits[self._first_bytes[unit] : self._first_bytes[unit + 1]]
        return ((of_unit[documents >> 3] >> (documents & 7)) & 1).astype(np.bool_)
