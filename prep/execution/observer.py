"""Who is told how the work goes on."""

from __future__ import annotations

from collections.abc import Mapping

from prep.document import Rejection
from prep.stages.tokenization import Progress


class Observer:
    """Is told how a build or an upload goes on; this one keeps it to itself."""

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        """A step begins; `totals` is its work by source, in tokens or in bytes, of which the rate is worth showing."""

    def done(self, source: str, amount: int) -> None:
        """So much more of the step is done."""

    def progress(self, progress: Progress) -> None:
        """Documents were read and tokenized."""

    def rejection(self, rejection: Rejection) -> None:
        """A document was left out."""
