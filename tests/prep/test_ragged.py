"""Runs within flat arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.ragged import gather


def test_runs_may_be_in_any_order_overlap_and_be_empty():
    values = np.arange(10, dtype=np.uint16)
    found = gather(values, np.array([7, 0, 2, 5]), np.array([2, 3, 3, 0]))
    assert found.tolist() == [7, 8, 0, 1, 2, 2, 3, 4]
    assert found.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_no_runs_give_an_empty_array(dtype):
    empty = np.empty(0, np.int64)
    assert gather(np.arange(3, dtype=dtype), empty, empty).tolist() == []
    assert gather(np.empty(0, dtype), np.array([0]), np.array([0])).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), max_size=30))
def test_gather_concatenates_slices(runs):
    values = np.arange(30, dtype=np.uint32)
    starts, lengths = (np.array([run[part] for run in runs], np.int64) for part in (0, 1))
    expected = [value for start, length in runs for value in values[start : start + length].tolist()]
    assert gather(values, starts, lengths).tolist() == expected
