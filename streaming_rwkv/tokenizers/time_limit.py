"""A time limit for calls of tokenizer libraries: a stranger's regular expression may search one text for years.

The libraries cannot be interrupted, but they let other threads run while they encode. A call runs in a thread, so that
Ctrl-C works while it does. After its time it is given up: the thread goes on until the program ends. While they read a
definition they let no thread run, so that is tried in another process.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

LEAST_SECONDS = 120.0
CHARACTERS_PER_SECOND = 10_000  # Hugging Face's library, the slower one, encodes 2 to 4 million

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
            f"no end after {seconds:,.0f} s for {characters:,} characters; its regular expressions may backtrack "
            "indefinitely"
        )
    return results[0]


# The alarm ends it, whatever it does, if this process is killed before it could do so.
_READ = (
    f"import signal; signal.alarm({int(LEAST_SECONDS) + 30}); "
    "import sys, tokenizers; tokenizers.Tokenizer.from_str(sys.stdin.read())"
)


def check_reading_ends(definition: bytes) -> None:
    """Try in another process whether Hugging Face's library reads a definition; what it says of it does not matter.

    Raises:
        TimeIsOver: it does not return, or the process is ended by a signal.
    """
    command = [sys.executable, "-c", _READ]
    try:
        done = subprocess.run(command, input=definition, capture_output=True, timeout=LEAST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TimeIsOver(
            f"no end after {LEAST_SECONDS:,.0f} s of reading it; its regular expressions may backtrack indefinitely in "
            "its added tokens"
        ) from None
    if done.returncode < 0:
        raise TimeIsOver(f"reading it ends the process with signal {-done.returncode}")
