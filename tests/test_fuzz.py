"""The first mutated files of each format: only a UserError leaves the program. See `tests/fuzz.py` for more of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import FORMATS, run_cases

# Cases that take about two seconds for each format, on one core.
FAST = {"manifest": 150, "index": 150, "shard": 100, "statistics": 150, "tokenizer": 60, "world": 80, "recipe": 60,
        "settings": 40, "inputs": 80, "token_ids": 150, "metrics": 80, "mark": 150, "weights": 30,
        "huggingface": 30, "sharded": 20}  # fmt: skip
SLOW_TIMES = 3


@pytest.fixture(autouse=True)
def _without_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_every_format_is_fuzzed() -> None:
    assert set(FAST) == set(FORMATS)


@pytest.mark.parametrize("name", FAST)
def test_only_a_user_error_leaves_the_program(name: str, tmp_path: Path) -> None:
    outcome = run_cases(name, tmp_path, count=FAST[name])
    assert outcome.escapes == {}
    assert outcome.counts["refused"] > FAST[name] // 4  # the mutations do reach the format


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_only_a_user_error_leaves_the_program_in_more_cases(name: str, tmp_path: Path) -> None:
    assert run_cases(name, tmp_path, first=FAST[name], count=SLOW_TIMES * FAST[name]).escapes == {}
