"""Faults of the input: the error that stops the build, and the reasons to reject a single document.

A broken *document* is counted with a reason. A broken *file* (truncated gzip, no such column, lines that are not
objects) is an `InputError`: a corpus must not shrink unnoticed because half a file was skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from streaming_rwkv.config import UserError

INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
NOT_AN_OBJECT = "not a JSON object"
FILTERED = "rejected by the filter"
TRANSFORMED_AWAY = "rejected by the transform"


class InputError(UserError):
    """A file, or with `on_error: stop` a document, that stops the build."""


@dataclass(frozen=True)
class BrokenRow:
    """Placeholder for a row without a usable text."""

    reason: str
    is_object: bool = False  # True if it is, or may be, a JSON object; then it does not count against the file
    is_requested: bool = False  # True if a hook rejected it; then `on_error: stop` does not stop at it


@dataclass(frozen=True)
class Reject:
    """A hook's result for a document to reject: `return prep.Reject("too short")`.

    Documents are counted by reason, so a reason is a short text that many documents share, without their numbers.
    """

    reason: str


def missing_text(key: str) -> str:
    """Return the reason to reject a document that does not have the key of the text."""
    return f"no {key!r}"
