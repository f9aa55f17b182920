"""Faults of the input: the error that stops the build, and the reasons to reject a single document.

A broken *document* is counted with a reason. A broken *file* (truncated gzip, no such column, lines that are not
objects) is an `InputError`: a corpus must not shrink unnoticed because half a file was skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streaming_rwkv.config import UserError

INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
NOT_AN_OBJECT = "not a JSON object"
FILTERED = "rejected by the filter"
TRANSFORMED_AWAY = "rejected by the transform"

# Of a source: as many as its hooks may return for one file, and more than there are for broken documents, at most one
# for each byte that a vocabulary lacks.
_MOST_REASONS = 400


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


class Reasons:
    """The reasons to reject documents of each source; manifests and tables list them, so they must be few."""

    def __init__(self) -> None:
        self._of: dict[str, set[str]] = {}

    def add(self, source: str, reasons: Iterable[str]) -> None:
        """Add reasons that documents of a source were rejected for.

        Raises:
            InputError: the source has too many.
        """
        known = self._of.setdefault(source, set())
        for reason in reasons:
            known.add(reason)
            if len(known) > _MOST_REASONS:
                raise InputError(
                    f"sources.{source}: documents are rejected for more than {_MOST_REASONS} different reasons, one of "
                    f"them {reason!r}; documents are counted by reason: leave what is of one file or document out of it"
                )


def missing_text(key: str) -> str:
    """Return the reason to reject a document that does not have the key of the text."""
    return f"no {key!r}"
