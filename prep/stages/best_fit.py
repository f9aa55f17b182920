"""Pieces to packs, by best-fit decreasing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack_best_fit(lengths: Sequence[int] | NDArray[np.integer], *, capacity: int) -> list[list[int]]:
    """Pack items, the longest first, each into the fullest pack with room for it; returns the items of each pack.

    Items of one length are interchangeable, so they are assigned in order by whole runs: the time grows with the number
    of different lengths and of packs, not with the number of items.

    >>> pack_best_fit([5, 3, 3, 2], capacity=8)  # 5+3, 3+2
    [[0, 1], [2, 3]]
    """
    pack_of, count = assign_best_fit(np.asarray(lengths, np.int64), capacity=capacity)
    packs: list[list[int]] = [[] for _ in range(count)]
    for item, pack in enumerate(pack_of.tolist()):
        packs[pack].append(item)
    return packs


def assign_best_fit(lengths: NDArray[np.int64], *, capacity: int) -> tuple[NDArray[np.int64], int]:
    """Return the (N,) pack of each item, and the number of packs; `lengths` (N,) are in 1 … capacity."""
    assert not len(lengths) or 1 <= lengths.min() <= lengths.max() <= capacity
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    open_packs: defaultdict[int, list[int]] = defaultdict(list)  # packs by the room that is left in them
    rooms = 0  # bit r is set if there is a pack with room r: the tightest gap is a bit operation away
    run_packs: list[int] = []
    run_counts: list[int] = []
    number_of_packs = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        waiting = count
        while waiting:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pack = open_packs[room].pop()
                if not open_packs[room]:
                    rooms &= ~(1 << room)
            else:
                room, pack = capacity, number_of_packs
                number_of_packs += 1
            # A pack that took one item has less room left, so it stays the tightest until it is too tight.
            taken = min(room // length, waiting)
            run_packs.append(pack)
            run_counts.append(taken)
            waiting -= taken
            if left := room - taken * length:
                open_packs[left].append(pack)
                rooms |= 1 << left
    pack_of = np.empty(len(lengths), np.int64)
    pack_of[by_length] = np.repeat(np.array(run_packs, np.int64), np.array(run_counts, np.int64))
    return pack_of, number_of_packs
