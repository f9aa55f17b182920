"""Decontamination: n-grams of evaluation texts, and the documents that contain one of them.

A text is normalized to words: NFKC, lower case, runs of letters and digits; a Chinese or Japanese character is a word
of its own. Each n-gram of words is a 64-bit hash. Documents are compared one by one, so neither units nor workers
affect the result.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

CONTAMINATED = "contaminated"

_CHARACTERS = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_CHARACTERS}]|[^\\W_{_CHARACTERS}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15


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
    return sums
