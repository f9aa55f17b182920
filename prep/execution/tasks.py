"""Types of tasks: how engines run them, and the reports that they send to the main process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.document import Rejection
from prep.execution.context import BuildContext
from prep.execution.observer import TokenizationProgress


@dataclass(frozen=True, kw_only=True)
class AuditSample:
    """Some documents with the ids of the fast tokenizer, to be compared with those of its reference."""

    where: list[str]
    texts: list[str]
    ids: list[NDArray[np.uint32]]


Report = Callable[[TokenizationProgress | AuditSample | Rejection], None]

Task = Callable[[BuildContext, Any, Callable[[Any], None]], Any]
"""A function that is called with the context, an item, and a function that sends a report; returns a result."""

Run = Callable[[Task, Sequence[Any]], Iterator[tuple[int, Any]]]
"""A function that runs a task for each item and yields the item's index and result, as items are finished."""
