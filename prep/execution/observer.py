"""The interface through which a build or an upload reports its progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prep.config import PrepConfig
from prep.document import Rejection
from prep.inputs.files import InputFile


@dataclass(frozen=True, kw_only=True)
class TokenizationProgress:
    """The amounts read and tokenized since the last report."""

    source: str
    documents: int
    text_bytes: int
    tokens: int
    input_bytes: int = 0
    """Of the units' `input_bytes`; all reports of a unit together come to the whole of it."""


class Observer:
    """Receives the progress of a build or an upload; this base class ignores it."""

    def inputs(self, files: Mapping[str, Sequence[InputFile]], config: PrepConfig) -> None:
        """Note the files that were found, before any of them is read."""

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        """Note that a step begins.

        Args:
            totals: the step's work by source, in tokens or in bytes.
            in_bytes: the work is in bytes.
        """

    def done(self, source: str, amount: int) -> None:
        """Note that an item of the step is done, with `amount` of its work that was not reported before."""

    def progress(self, progress: TokenizationProgress) -> None:
        """Note that documents were read and tokenized."""

    def rejection(self, rejection: Rejection) -> None:
        """Note that a document was rejected."""
