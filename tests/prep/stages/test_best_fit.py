"""Best fit, by eye and against its definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prep.stages.best_fit import assign_best_fit, pack_best_fit


def test_best_fit_fills_the_tightest_gap():
    assert pack_best_fit(lengths=[5, 3, 3, 2], capacity=8) == [[0, 1], [2, 3]]  # 5+3, 3+2


def test_the_longest_come_first():
    assert pack_best_fit(lengths=[2, 3, 3, 5], capacity=8) == [[1, 3], [0, 2]]  # 5+3, 3+2


def test_the_fuller_pack_is_chosen():
    # 6 and 5 open a pack each; 2 fits both, and fills the one of 6.
    assert pack_best_fit(lengths=[6, 5, 2], capacity=8) == [[0, 2], [1]]


def test_items_of_one_length_share_packs():
    assert pack_best_fit(lengths=[4, 4, 4, 4, 4], capacity=8) == [[0, 1], [2, 3], [4]]


def test_an_item_may_fill_a_pack():
    assert pack_best_fit(lengths=[8, 8], capacity=8) == [[0], [1]]


def test_no_items_need_no_pack():
    assert pack_best_fit(lengths=[], capacity=8) == []


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Rooms left in the packs, one item after another, the longest first."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 70))
def test_packs_are_as_full_as_best_fit_decreasing_makes_them(lengths, capacity):
    pack_of, count = assign_best_fit(np.array(lengths, np.int64), capacity=capacity)
    used = np.bincount(pack_of, weights=lengths, minlength=count) if lengths else np.zeros(0)
    assert sorted(capacity - used) == naive_best_fit(lengths, capacity)
