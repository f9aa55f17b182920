"""One step of a build: a task for each of many items, with progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from prep.execution.observer import Observer
from prep.execution.tasks import Run, Task


def run_step(
    name: str,
    run: Run,
    task: Task,
    items: Sequence[Any],
    sizes: Sequence[tuple[str, int]],
    observer: Observer,
    on_result: Callable[[int, Any], None] | None = None,
    *,
    in_bytes: bool = False,
    are_reported: bool = False,
) -> list[Any]:
    """Run a task for each item and return the results in the order of the items.

    Large items are started first, so that the step does not end with a single large one. Items of about one size are
    started in their order, since a window's shards can be uploaded when those of the windows before it are counted.

    Args:
        sizes: (source, amount) of each item, for the progress.
        on_result: is called with the index and the result of each item as soon as it is done.
        in_bytes: amounts are bytes, otherwise tokens.
        are_reported: the tasks themselves report their progress.
    """
    totals: Counter[str] = Counter()
    for source, size in sizes:
        totals[source] += size
    observer.step(name, totals=totals, in_bytes=in_bytes)
    order = sorted(range(len(items)), key=lambda index: -sizes[index][1].bit_length())
    results: dict[int, Any] = {}
    for place, result in run(task, [items[index] for index in order]):
        results[order[place]] = result
        if on_result is not None:
            on_result(order[place], result)
        source, size = sizes[order[place]]
        observer.done(source, 0 if are_reported else size)
    return [results[index] for index in range(len(items))]
