"""Spikes of the gradient's norm, by hand."""

from __future__ import annotations

import math

from streaming_rwkv.train.callbacks.spikes import SpikeDetector


def found(norms: list[float], *, norm_over: float = 8, window: int = 4) -> list[float | None]:
    detector = SpikeDetector(norm_over, window=window)
    return [detector.spike(norm) for norm in norms]


def test_a_norm_above_a_multiple_of_the_median_before_it_is_a_spike() -> None:
    assert found([1, 2, 3, 17, 16, 1]) == [None, None, None, 2, None, None]  # medians 1, 1.5, 2, 2.5, 9.5


def test_there_is_no_spike_before_a_quarter_of_the_window() -> None:
    assert found([1, 1, 100], window=12) == [None, None, None]
    assert found([1, 1, 1, 100], window=12) == [None, None, None, 1]


def test_a_new_level_becomes_the_median() -> None:
    assert found([1, 1, 1, 1, 20, 20, 20, 20]) == [None, None, None, None, 1, 1, None, None]


def test_norms_that_are_not_finite_are_not_counted() -> None:
    detector = SpikeDetector(2, window=4)
    for norm in (1.0, math.nan, math.inf, 1.0):
        detector.spike(norm)
    assert list(detector.norms) == [1.0, 1.0]


def test_the_median_continues_from_the_norms_of_a_checkpoint() -> None:
    detector = SpikeDetector(2, window=4)
    detector.load([9, 1, 1, 1, 1])
    assert list(detector.norms) == [1, 1, 1, 1]
    assert detector.spike(2.5) == 1
