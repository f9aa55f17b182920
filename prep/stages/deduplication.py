"""The second stage: exact deduplication in bounded memory, by ranges of hashes that are small enough to sort.

Of documents with equal text the first in canonical order is kept (sources by name, files by name, rows). All of a
range's hashes are looked at together, so the result depends on neither workers nor the order of their work. In the end
all ranges become one bit for each document, so that packing opens one file, whatever the number of ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.execution.context import BuildContext, unit_task
from prep.execution.intermediate import DUPLICATES_TASK, HASHES_NAME, read_hashes, write_duplicates
from prep.execution.observer import Observer
from prep.execution.steps import run_step
from prep.execution.task_store import DoneRecord, done_folder, finish, hash_file, load_done, temporary_task_folder
from prep.execution.tasks import Report, Run
from prep.stages.records import UnitRecord
from streaming_rwkv.shards import offsets_of

_DOCUMENTS_PER_RANGE = 1 << 21  # about 100 MB while they are sorted
_PLACES_AT_ONCE = 1 << 20
_RESULT_NAME = "duplicates.npy"


@dataclass(frozen=True, kw_only=True)
class HashRange:
    """The documents whose hash has its upper 64 bits in [index, index + 1) * 2**64 / ranges."""

    index: int
    ranges: int
    runs: tuple[tuple[int, ...], ...]  # of each unit's hashes.bin; one object for all ranges


class RangeRecord(DoneRecord):
    """The number of duplicates in a range; its file lists them."""

    duplicates: int


def deduplicate(context: BuildContext, units: Sequence[UnitRecord], run: Run, observer: Observer) -> None:
    """Find the duplicates among the documents of all units, if the configuration says so."""
    ranges = plan_ranges(units) if context.config.deduplicate == "exact" else []
    run_step("finding duplicates", run, find_duplicates, ranges, [("all sources", 1)] * len(ranges), observer)
    if ranges:
        join_ranges(context, units, ranges=len(ranges))


def plan_ranges(units: Sequence[UnitRecord]) -> list[HashRange]:
    """Divide the hashes of all units into ranges of about equal size."""
    ranges = max(1, -(-sum(unit.documents for unit in units) // _DOCUMENTS_PER_RANGE))
    runs = tuple(tuple(unit.hash_runs) for unit in units)
    return [HashRange(index=index, ranges=ranges, runs=runs) for index in range(ranges)]


def _range_task(index: int) -> str:
    return f"duplicates/{index:06}"


def find_duplicates(context: BuildContext, hash_range: HashRange, report: Report) -> RangeRecord:
    """Find the duplicates in a range of hashes unless that is done already."""
    name = _range_task(hash_range.index)
    record = load_done(context.work_folder, name, RangeRecord)
    if record is None:
        duplicates = _find(context, hash_range)
        with temporary_task_folder(context.work_folder) as folder:
            np.save(folder / _RESULT_NAME, duplicates)
            record = RangeRecord(files={_RESULT_NAME: hash_file(folder / _RESULT_NAME)}, duplicates=len(duplicates))
            finish(folder, record, work=context.work_folder, name=name)
    return record


def _find(context: BuildContext, hash_range: HashRange) -> NDArray[np.uint64]:
    """Return the (D,) duplicates in a range as unit << 32 | document, rising."""
    bounds = [-(-(edge << 64) // hash_range.ranges) for edge in (hash_range.index, hash_range.index + 1)]
    hashes, places = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
    for unit, runs in enumerate(hash_range.runs):
        for run, documents in read_hashes(
            done_folder(context.work_folder, unit_task(context.units[unit])) / HASHES_NAME, runs
        ):
            begin, end = (
                len(run) if bound >> 64 else int(np.searchsorted(run[:, 0], np.uint64(bound))) for bound in bounds
            )
            hashes.append(np.array(run[begin:end]))  # a copy, or thousands of files would stay mapped
            places.append(documents[begin:end].astype(np.uint64) | np.uint64(unit << 32))
    return later_copies(np.concatenate(hashes), np.concatenate(places))


def later_copies(hashes: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the (D,) places, rising, of documents whose (N, 2) hash a document in a lower place has too."""
    order = np.lexsort((places, hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    repeats = (ordered[1:] == ordered[:-1]).all(axis=1)
    return np.sort(places[order[1:][repeats]])


def join_ranges(context: BuildContext, units: Sequence[UnitRecord], *, ranges: int) -> None:
    """Join the duplicates of all ranges into one bit for each document, unless that is done already."""
    if load_done(context.work_folder, DUPLICATES_TASK, DoneRecord) is not None:
        return
    first_bytes = offsets_of(np.array([-(-unit.documents // 8) for unit in units], np.int64))
    bits = np.zeros(first_bytes[-1], np.uint8)
    for index in range(ranges):
        places = np.load(done_folder(context.work_folder, _range_task(index)) / _RESULT_NAME, mmap_mode="r")
        for first in range(0, len(places), _PLACES_AT_ONCE):
            some = places[first : first + _PLACES_AT_ONCE]
            documents = some.astype(np.uint32)  # the lower half
            at = first_bytes[(some >> np.uint64(32)).astype(np.int64)] + (documents >> 3)
            np.bitwise_or.at(bits, at, np.left_shift(1, documents & 7).astype(np.uint8))
    with temporary_task_folder(context.work_folder) as folder:
        names = write_duplicates(bits, first_bytes, folder)
        record = DoneRecord(files={name: hash_file(folder / name) for name in names})
        finish(folder, record, work=context.work_folder, name=DUPLICATES_TASK)
