"""Exact deduplication: all but the first of equal documents are duplicates."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.build import build
from prep.execution.intermediate import DUPLICATES_TASK, Duplicates
from prep.execution.task_store import done_folder
from prep.stages import deduplication as duplicates
from prep.stages.deduplication import HashRange, join_ranges, later_copies, plan_ranges


def test_all_but_the_first_of_equal_hashes_are_duplicates():
    hashes = np.array([[5, 1], [5, 2], [5, 1], [7, 1], [5, 1]], np.uint64)
    places = np.array([40, 10, 20, 5, 30], np.uint64)
    assert later_copies(hashes, places).tolist() == [30, 40]  # the one at 20 came first


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_later_copies_agree_with_a_set(pairs):
    seen: set[tuple[int, int]] = set()
    expected = []
    for place, pair in enumerate(pairs):
        if pair in seen:
            expected.append(place)
        seen.add(pair)
    hashes = np.array(pairs, np.uint64).reshape(-1, 2)
    assert later_copies(hashes, np.arange(len(pairs), dtype=np.uint64)).tolist() == expected


def test_the_number_of_ranges_bounds_the_documents_in_each(monkeypatch):
    class Unit:
        documents = 10
        hash_runs = (6, 4)

    monkeypatch.setattr(duplicates, "_DOCUMENTS_PER_RANGE", 8)
    runs = ((6, 4), (6, 4))
    assert plan_ranges([Unit(), Unit()]) == [HashRange(index=index, ranges=3, runs=runs) for index in range(3)]


def duplicates_of(ranges: list[list[tuple[int, int]]], *, documents: list[int], work: Path) -> list[list[int]]:
    """Return the duplicates of each unit, where `ranges` have the (unit, document) found in each range."""
    for index, found in enumerate(ranges):
        folder = done_folder(work, f"duplicates/{index:06}")
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "duplicates.npy", np.array([unit << 32 | number for unit, number in found], np.uint64))
    context = SimpleNamespace(work_folder=work)
    join_ranges(context, [SimpleNamespace(documents=count) for count in documents], ranges=len(ranges))
    joined = Duplicates(done_folder(work, DUPLICATES_TASK))
    numbers = [np.arange(count, dtype=np.uint32) for count in documents]
    return [of[joined.are_among(of, unit=unit)].tolist() for unit, of in enumerate(numbers)]


@pytest.mark.parametrize("places_at_once", [1, 1000])
def test_ranges_are_joined_to_one_bit_for_each_document(tmp_path, monkeypatch, places_at_once):
    monkeypatch.setattr(duplicates, "_PLACES_AT_ONCE", places_at_once)
    ranges = [[(0, 1), (0, 7), (2, 8), (3, 16)], [], [(0, 0), (3, 0), (3, 15)]]
    documents = [8, 0, 9, 17, 3]
    expected = [[0, 1, 7], [], [8], [0, 15, 16], []]
    assert duplicates_of(ranges, documents=documents, work=tmp_path) == expected
    (bits,) = tmp_path.glob("done/*/bits.npy")
    content = bytearray(bits.read_bytes())
    content[-1] ^= 1
    bits.write_bytes(content)  # as a loss of power may leave it
    assert duplicates_of(ranges, documents=documents, work=tmp_path) == expected


def test_the_number_of_ranges_is_not_that_of_open_files(config, write_lines, tmp_path, monkeypatch):
    write_lines(tmp_path / "corpus" / "a.jsonl", [str(number % 90) for number in range(180)])
    monkeypatch.setattr(duplicates, "_DOCUMENTS_PER_RANGE", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 50, hard))
    try:
        counts = build(config()).manifest.counts["corpus"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (counts.documents["train"], counts.duplicates) == (90, 90)


@pytest.mark.parametrize("documents_per_range", [1, 3, 1000])
def test_the_number_of_ranges_changes_nothing(config, write_lines, tmp_path, monkeypatch, documents_per_range):
    for number in range(3):
        write_lines(tmp_path / "corpus" / f"{number}.jsonl", [str(row * number % 13) for row in range(40)])
    monkeypatch.setattr(duplicates, "_DOCUMENTS_PER_RANGE", documents_per_range)
    counts = build(config(unit_bytes=100)).manifest.counts["corpus"]
    assert (counts.documents["train"], counts.duplicates) == (13, 120 - 13)
