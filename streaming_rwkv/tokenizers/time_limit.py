"""A time limit for calls of tokenizer libraries: a stranger's regular expression may search one text for years.

The libraries cannot be interrupted, but they let other threads run. A call runs in a thread, so that Ctrl-C works while
it does. After its time it is given up: the thread goes on until the program ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

LEAST_SECONDS = 120.0
CHARACTERS_PER_SECOND = 10_000  # a hundredth of what the slower library does

T = TypeVar("T")


class TimeIsOver(Exception):
    """A call did not return in its time; the text says so."""


def within_limit(call: Callable[[], T], *, characters: int) -> T:
    """Return the result of a call, or raise its error.

    Args:
        characters: of the texts, by which the time is measured.
    Raises:
        TimeIsOver: the call does not return.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  # a panic, perhaps; it belongs to the caller
            errors.append(error)

    seconds = LEAST_SECONDS + characters / CHARACTERS_PER_SECOND
    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeIsOver(
            f"no end after {seconds:,.0f} s for {characters:,} characters; its regular expressions may search for ever"
        )
    return results[0]
