"""Which of equal documents are left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep import duplicates
from prep.duplicates import HashRange, first_come, plan_ranges
from prep.pipeline import build


def test_all_but_the_first_of_equal_hashes():
    hashes = np.array([[5, 1], [5, 2], [5, 1], [7, 1], [5, 1]], np.uint64)
    places = np.array([40, 10, 20, 5, 30], np.uint64)
    assert first_come(hashes, places).tolist() == [30, 40]  # the one at 20 came first


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_it_is_what_a_set_would_say(pairs):
    seen: set[tuple[int, int]] = set()
    expected = []
    for place, pair in enumerate(pairs):
        if pair in seen:
            expected.append(place)
        seen.add(pair)
    hashes = np.array(pairs, np.uint64).reshape(-1, 2)
    assert first_come(hashes, np.arange(len(pairs), dtype=np.uint64)).tolist() == expected


def test_ranges_are_as_many_as_memory_wants(monkeypatch):
    class Unit:
        documents = 10
        hash_runs = (6, 4)

    monkeypatch.setattr(duplicates, "_DOCUMENTS_PER_RANGE", 8)
    runs = ((6, 4), (6, 4))
    assert plan_ranges([Unit(), Unit()]) == [HashRange(index=index, ranges=3, runs=runs) for index in range(3)]


@pytest.mark.parametrize("documents_per_range", [1, 3, 1000])
def test_the_number_of_ranges_changes_nothing(config, write_lines, tmp_path, monkeypatch, documents_per_range):
    for number in range(3):
        write_lines(tmp_path / "corpus" / f"{number}.jsonl", [str(row * number % 13) for row in range(40)])
    monkeypatch.setattr(duplicates, "_DOCUMENTS_PER_RANGE", documents_per_range)
    books = build(config(unit_bytes=100)).manifest.books["corpus"]
    assert (books.documents["train"], books.duplicates) == (13, 120 - 13)
