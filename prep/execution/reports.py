"""Reports that a task sends to the main process while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.document import Rejection


@dataclass(frozen=True, kw_only=True)
class TokenizationProgress:
    """The amounts read and tokenized since the last report."""

    source: str
    documents: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class AuditSample:
    """Some documents with the ids of the fast tokenizer, to be compared with those of its reference."""

    where: list[str]
    texts: list[str]
    ids: list[NDArray[np.uint32]]


Report = Callable[[TokenizationProgress | AuditSample | Rejection], None]
