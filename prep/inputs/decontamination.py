"""Evaluation files to the n-grams of their texts, read once, in the main process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.config import DecontaminationConfig, SourceConfig
from prep.inputs.faults import BrokenRow, InputError
from prep.inputs.files import IDS_SUFFIX
from prep.inputs.readers import read_rows
from prep.inputs.units import find_sources, plan_units
from prep.ngrams import Evaluation, ngram_hashes
from streaming_rwkv.config import UserError

KEY = "decontaminate"  # of the recipe; in errors, `sources.decontaminate` names its files

_MOST_NGRAMS = 1 << 25
_UNIT_BYTES = 1 << 23
_PENDING_NGRAMS = 1 << 20


class _WholeRecords(SourceConfig):
    @property
    def has_hooks(self) -> bool:
        return True  # readers yield whole records for hooks

    @property
    def needs_text(self) -> bool:
        return False


def read_evaluation(config: DecontaminationConfig) -> Evaluation:
    """Read evaluation files: all strings of their records, at any depth.

    Raises:
        UserError: a file cannot be read as a whole, holds ids, or has no text of `ngram` words, or there are too many.
    """
    source = _WholeRecords(paths=config.files)
    files = find_sources({KEY: source})
    if ids := [file.path for file in files[KEY] if file.suffix == IDS_SUFFIX]:
        raise UserError(f"{KEY}.files: {ids[0]}: holds ids; give the texts as JSON lines or parquet")
    known = np.empty(0, np.uint64)
    for hashes in _in_blocks(_hashes(source, config.ngram, files)):
        known = np.union1d(known, hashes)
        if len(known) > _MOST_NGRAMS:
            raise UserError(
                f"{KEY}.files: more than {_MOST_NGRAMS:,} different {config.ngram}-grams; name evaluation sets only, "
                "not training data"
            )
    if not len(known):
        raise UserError(
            f"{KEY}.files: no text of {config.ngram} words or more in {', '.join(config.files)}; lower `{KEY}.ngram`, "
            "or fix the files"
        )
    return Evaluation(known, ngram=config.ngram)


def _hashes(source: SourceConfig, ngram: int, files: Any) -> Iterator[NDArray[np.uint64]]:
    for unit in plan_units({KEY: source}, unit_bytes=_UNIT_BYTES, files=files):
        for part in unit.parts:
            for rows, records, *_ in read_rows(part, source):
                for row, record in zip(rows.tolist(), records, strict=True):
                    if isinstance(record, BrokenRow):
                        raise InputError(
                            f"{part.file.path}: row {row}: {record.reason}; fix it: an evaluation set is read "
                            "as a whole"
                        )
                    for text in _strings(record):
                        yield ngram_hashes(text, ngram)


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


def _in_blocks(hashes: Iterable[NDArray[np.uint64]]) -> Iterator[NDArray[np.uint64]]:
    pending: list[NDArray[np.uint64]] = []
    count = 0
    for some in hashes:
        pending.append(some)
        count += len(some)
        if count >= _PENDING_NGRAMS:
            yield np.concatenate(pending)
            pending, count = [], 0
    if pending:
        yield np.concatenate(pending)
