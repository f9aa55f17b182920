"""Decontamination: n-grams of evaluation texts, and the documents that contain one of them.

A text is normalized to words: NFKC, lower case, runs of letters and digits; a Chinese or Japanese character is a word
of its own. Each n-gram of words is a 64-bit hash. Evaluation files are read once, in the main process; workers get the
sorted hashes. Documents are compared one by one, so neither units nor workers affect the result.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.config import DecontaminationConfig, SourceConfig
from prep.document import mix
from prep.inputs.faults import BrokenRow, InputError
from prep.inputs.files import IDS_SUFFIX
from prep.inputs.readers import read_rows
from prep.inputs.units import find_sources, plan_units
from streaming_rwkv.config import UserError

CONTAMINATED = "contaminated"
KEY = "decontaminate"  # of the recipe; in errors, `sources.decontaminate` names its files

_CHARACTERS = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_CHARACTERS}]|[^\\W_{_CHARACTERS}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
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


class Evaluation:
    """The n-grams of evaluation texts."""

    def __init__(self, hashes: NDArray[np.uint64], *, ngram: int) -> None:
        self._hashes, self._ngram = hashes, ngram  # sorted

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def sha256(self) -> str:
        """A hash of everything that decides which documents are contaminated."""
        return hashlib.sha256(b"%d\n" % self._ngram + self._hashes.astype("<u8").tobytes()).hexdigest()

    def contaminated(self, texts: Sequence[str]) -> list[int]:
        """Return the indices of the texts that contain an n-gram of an evaluation text."""
        return [index for index, text in enumerate(texts) if self._is_in(ngram_hashes(text, self._ngram))]

    def _is_in(self, hashes: NDArray[np.uint64]) -> bool:
        if not len(self._hashes) or not len(hashes):
            return False
        places = np.searchsorted(self._hashes, hashes)
        places[places == len(self._hashes)] = 0
        return bool((self._hashes[places] == hashes).any())


def words_of(text: str) -> list[str]:
    """Return the normalized words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngram_hashes(text: str, ngram: int) -> NDArray[np.uint64]:
    """Return (N,) a hash of each run of `ngram` words, in the order of the text; none for a shorter text."""
    words = words_of(text)
    if len(words) < ngram:
        return np.empty(0, np.uint64)
    of_word = {word: xxhash.xxh3_64_intdigest(word.encode(errors="replace")) for word in set(words)}
    hashes = np.fromiter(map(of_word.__getitem__, words), np.uint64, count=len(words))
    count = len(words) - ngram + 1
    sums = np.zeros(count, np.uint64)
    for place in range(ngram):
        sums = sums * np.uint64(_MULTIPLIER) + hashes[place : place + count]
    return mix(sums, seed=ngram)


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
