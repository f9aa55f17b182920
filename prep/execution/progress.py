"""Progress on the console."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prep.document import Rejection
from prep.execution.observer import Observer, TokenizationProgress
from streaming_rwkv.console import shown

_REJECTIONS_SHOWN = 5
_SECONDS_BETWEEN_LINES = 10
_ALL = ""  # no source has this name


class ConsoleObserver(Observer):
    """Shows a bar for each source on a terminal, a line every few seconds elsewhere, and the first rejections."""

    def __init__(self, console: Console, bars: Progress, *, are_listed: bool) -> None:
        self._console = console
        self._further = "are only listed in rejected.jsonl" if are_listed else "are only counted"
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._name = "starting"
        self._started = self._last_line = time.monotonic()
        self._read: dict[str, Counter[str]] = defaultdict(Counter)
        self._rejections: Counter[str] = Counter()
        self._in_bytes = False
        self._done: Counter[str] = Counter()

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        self._name, self._started = name, time.monotonic()
        self._in_bytes, self._done = in_bytes, Counter()
        if self._console.is_terminal:
            self._bars.start()  # not earlier: it starts a thread, and workers may be forked until the first step
        for task in self._tasks.values():
            self._bars.remove_task(task)
        named = {source: total for source, total in totals.items() if total}
        self._tasks = {
            source: self._bars.add_task(f"{name} {source}", total=total, speed="") for source, total in named.items()
        }
        if len(named) != 1:
            self._tasks[_ALL] = self._bars.add_task(name, total=sum(named.values()), speed="")

    def done(self, source: str, amount: int) -> None:
        for name in (source, _ALL):
            self._done[name] += amount
            if name in self._tasks:
                self._bars.advance(self._tasks[name], amount)
                if self._in_bytes:
                    seconds = max(time.monotonic() - self._started, 1e-3)
                    rate = f"{self._done[name] / 1e6:,.1f} MB, {self._done[name] / 1e6 / seconds:.1f} MB/s"
                    self._bars.update(self._tasks[name], speed=rate)
        self._print_line()

    def progress(self, progress: TokenizationProgress) -> None:
        amounts = {"documents": progress.documents, "text_bytes": progress.text_bytes, "tokens": progress.tokens}
        for name in (progress.source, _ALL):
            self._read[name].update(amounts)
            if name in self._tasks:
                self._bars.update(self._tasks[name], speed=self._speed(name))
        self._print_line()

    def rejection(self, rejection: Rejection) -> None:
        self._rejections[rejection.reason] += 1
        seen = self._rejections[rejection.reason]
        if seen <= _REJECTIONS_SHOWN:
            more = f"; further ones {self._further}" if seen == _REJECTIONS_SHOWN else ""
            self._print(f"rejected: {rejection.source}: {rejection}{more}")

    def _speed(self, name: str) -> str:
        read, seconds = self._read[name], max(time.monotonic() - self._started, 1e-3)
        return (
            f"{read['documents']:,} documents {read['text_bytes'] / 1e6 / seconds:.1f} MB/s "
            f"{read['tokens'] / 1e6 / seconds:.2f} M tokens/s"
        )

    def _print_line(self) -> None:
        if self._console.is_terminal or time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        whole = self._bars.tasks[-1]
        left = f", {whole.time_remaining:.0f} s left" if whole.time_remaining is not None else ""
        self._print(f"{self._name}: {whole.percentage:.0f} %{left}; {whole.fields['speed']}")

    def _print(self, line: str) -> None:
        self._console.print(shown(line), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def observing(console: Console, *, are_listed: bool = True) -> Iterator[ConsoleObserver]:
    """Yield an observer that shows the progress on `console`.

    Args:
        are_listed: whether rejected documents are also written to rejected.jsonl.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    try:
        yield ConsoleObserver(console, bars, are_listed=are_listed)
    finally:
        if console.is_terminal:
            bars.stop()
