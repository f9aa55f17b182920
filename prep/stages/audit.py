"""The audit: samples of texts whose ids are compared with those of the reference tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.document import Documents, Rejection
from prep.execution.observer import Observer, TokenizationProgress
from prep.execution.tasks import AuditSample
from streaming_rwkv.config import UserError
from streaming_rwkv.tokenizer import TokenBatch, Tokenizer
from streaming_rwkv.version import PROGRAM

logger = logging.getLogger(__name__)

_SAMPLED_DOCUMENTS = 64


class AuditError(UserError):
    """The fast tokenizer gave other ids than its reference, the library that defines them."""


def sample_for_audit(tokenizer: Tokenizer, documents: Documents, batch: TokenBatch, *, budget: int) -> AuditSample:
    """Choose documents that are spread over the chunk and have `budget` bytes together.

    If all documents are longer, the sample is the beginning of the first one.
    """
    chosen: list[int] = []
    count = len(documents.texts)
    for index in range(0, count, max(1, count // _SAMPLED_DOCUMENTS)):
        size = len(documents.texts[index].encode())
        if size <= budget:
            chosen.append(index)
            budget -= size
    if not chosen:
        beginning = documents.texts[0].encode()[:budget].decode(errors="ignore")
        where = f"{documents.files[documents.file_of[0]]}: beginning of row {documents.rows[0]}"
        return AuditSample(where=[where], texts=[beginning], ids=[tokenizer.encode_batch([beginning]).ids])
    return AuditSample(
        where=[f"{documents.files[documents.file_of[index]]}: row {documents.rows[index]}" for index in chosen],
        texts=[documents.texts[index] for index in chosen],
        ids=[batch[index] for index in chosen],
    )


class Audit:
    """Compares samples' ids with the reference's, and their texts with the decoded ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._has_warned = False

    def check(self, sample: AuditSample) -> None:
        """Compare a sample; warn of the first text that its ids do not decode to.

        Raises:
            AuditError: an id is not the reference's.
        """
        expected = self._tokenizer.encode_reference(sample.texts)
        for where, text, found, wanted in zip(sample.where, sample.texts, sample.ids, expected, strict=True):
            if not np.array_equal(found, wanted):
                raise self._difference(where, text, found, wanted)
            if not self._has_warned:
                self._warn_if_lossy(where, text, self._tokenizer.decode(wanted))

    def _difference(self, where: str, text: str, found: NDArray[Any], wanted: NDArray[Any]) -> AuditError:
        at = _first_difference(found.tolist(), wanted.tolist())
        context = self._tokenizer.decode(wanted[max(0, at - 4) : at + 4])
        return AuditError(
            f"tokenizer {self._tokenizer.name}: {where}: id {at} is {found[at : at + 1].tolist()}, the reference gives "
            f"{wanted[at : at + 1].tolist()} (near {context!r} in a text of {len(text)} characters)"
        )

    def _warn_if_lossy(self, where: str, text: str, decoded: str) -> None:
        if decoded == text:
            return
        at = _first_difference(text, decoded)
        near = slice(max(0, at - 12), at + 12)
        logger.warning(
            "tokenizer %s: decoding the ids of a text does not give the same text, so the model never sees all of it: "
            "%s: %r becomes %r. If that is not intended, choose a byte-level tokenizer (`%s train-tokenizer`)",
            self._tokenizer.name,
            where,
            text[near],
            decoded[near],
            PROGRAM,
        )
        self._has_warned = True


def report_handler(observer: Observer, tokenizer: Tokenizer) -> Callable[[Any], None]:
    """Return the receiver of workers' reports: samples are audited, all others are for the observer."""
    audit = Audit(tokenizer)

    def on_report(report: TokenizationProgress | AuditSample | Rejection) -> None:
        match report:
            case TokenizationProgress():
                observer.progress(report)
            case Rejection():
                observer.rejection(report)
            case AuditSample():
                audit.check(report)

    return on_report


def warn_of_reference(error: AuditError) -> None:
    """Warn that a build starts again with the reference tokenizer."""
    logger.warning("%s; all texts are encoded again with the reference, about twenty times slower", error)


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))
