"""Progress on the console."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from prep.config import PrepConfig
from prep.document import Rejection
from prep.execution.observer import Observer, TokenizationProgress
from prep.inputs.files import InputFile
from streaming_rwkv.console import shown, shown_bytes, shown_duration

_REJECTIONS_SHOWN = 5
_SECONDS_BETWEEN_LINES = 10
_ALL = ""  # no source has this name
_BARS_FROM_COLUMNS = 100  # a narrower terminal has only the bar of the whole step
_MOST_BARS = 12


@dataclass(kw_only=True)
class _Work:
    """The work of one source in a step, or of all."""

    total: int
    began: float  # when the first of it was worked on, about
    seen: float  # when the last of it was reported
    done: int = 0
    repeated: int = 0  # of `done`: finished by an earlier start
    read: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        return max(self.seen - self.began, 1e-3)

    def left(self, now: float) -> str:
        """Return the time left, as far as it is known."""
        fresh = self.done - self.repeated
        if not fresh or now - self.began < 1:
            return "left –"
        return f"left {shown_duration((now - self.began) * (self.total - self.done) / fresh)}"


class ConsoleObserver(Observer):
    """Shows bars on a terminal, a line every few seconds elsewhere, and the first rejections."""

    def __init__(self, console: Console, bars: Progress, *, are_listed: bool) -> None:
        self._console = console
        self._further = "are only listed in rejected.jsonl" if are_listed else "are only counted"
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._work: dict[str, _Work] = {}
        self._name = ""
        self._in_bytes = False
        self._last_line = time.monotonic()
        self._rejections: Counter[str] = Counter()

    def inputs(self, files: Mapping[str, Sequence[InputFile]], config: PrepConfig) -> None:
        every = [file for of_source in files.values() for file in of_source]
        size = shown_bytes(sum(file.size for file in every))
        self._print(
            f"reading {_counted(len(files), 'source')}, {_counted(len(every), 'file')}, {size}; "
            f"{_counted(config.worker_count, 'worker')}; {config.out}"
        )

    def step(self, name: str, *, totals: Mapping[str, int], in_bytes: bool = False) -> None:
        self.end_step()
        self._name, self._in_bytes = name, in_bytes
        now = self._last_line = time.monotonic()
        named = {source: total for source, total in totals.items() if total}
        self._work = {
            source: _Work(total=total, began=now, seen=now)
            for source, total in {**named, _ALL: sum(named.values())}.items()
        }
        if self._console.is_terminal:
            self._bars.start()  # not earlier: it starts a thread, and workers may be forked until the first step
            self._add_bars(named)
        else:
            self._print(f"{name}: {self._amount(self._work[_ALL].total)}")

    def _add_bars(self, totals: Mapping[str, int]) -> None:
        largest = sorted(totals, key=lambda source: -totals[source])[:_MOST_BARS]
        has_bars = self._console.width >= _BARS_FROM_COLUMNS and len(totals) > 1
        names = [*(source for source in totals if source in largest and has_bars), _ALL]
        for name in names:
            self._tasks[name] = self._bars.add_task(
                shown(name) or self._name, total=self._work[name].total, about=self._about(name)
            )

    def end_step(self) -> None:
        """Remove the bars of the step, or say in a log that it is done."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks = {}
        if self._name and not self._console.is_terminal:
            work = self._work[_ALL]
            if work.done >= work.total:
                self._print(
                    f"{self._name}: done in {shown_duration(time.monotonic() - work.began)}; {self._rates(work)}"
                )
        self._name = ""

    def done(self, source: str, amount: int) -> None:
        self._advance(source, amount)

    def progress(self, progress: TokenizationProgress) -> None:
        amounts = {"documents": progress.documents, "text_bytes": progress.text_bytes, "tokens": progress.tokens}
        is_repeated = not progress.documents and progress.input_bytes > 0
        self._advance(progress.source, progress.input_bytes, read=amounts, is_repeated=is_repeated)

    def _advance(
        self, source: str, amount: int, *, read: Mapping[str, int] | None = None, is_repeated: bool = False
    ) -> None:
        now = time.monotonic()
        for name in (source, _ALL):
            if (work := self._work.get(name)) is None:
                continue
            if not work.done and not work.read:  # the source was waiting until about the last report of another one
                work.began = self._work[_ALL].seen
            work.done += amount
            work.repeated += amount if is_repeated else 0
            work.read.update(read or {})
            work.seen = now
            self._show(name)
        self._print_line()

    def rejection(self, rejection: Rejection) -> None:
        self._rejections[rejection.reason] += 1
        seen = self._rejections[rejection.reason]
        if seen <= _REJECTIONS_SHOWN:
            more = f"; further ones {self._further}" if seen == _REJECTIONS_SHOWN else ""
            self._print(f"rejected: {rejection.source}: {rejection}{more}")

    def _show(self, name: str) -> None:
        if name in self._tasks:
            self._bars.update(self._tasks[name], completed=self._work[name].done, about=self._about(name))

    def _about(self, name: str) -> str:
        work = self._work[name]
        return f"{self._so_far(work)}  {work.left(time.monotonic())}  {self._rates(work)}"

    def _so_far(self, work: _Work) -> str:
        done, total = (self._amount(amount, like=work.total) for amount in (work.done, work.total))
        return f"{done.partition(' ')[0]}/{total} {work.done / max(1, work.total):4.0%}"

    def _amount(self, amount: float, *, like: float | None = None) -> str:
        """Return an amount with its unit, by default the largest one below it.

        Args:
            like: an amount whose unit is used.
        """
        size = amount if like is None else like
        for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= limit:
                return f"{amount / limit:,.1f} {prefix}{'B' if self._in_bytes else ''}"
        return f"{amount:,.0f}{' B' if self._in_bytes else ''}"

    def _rates(self, work: _Work) -> str:
        """Return the speed while this was worked on; with more figures where a line has room for them."""
        if not work.read:
            return f"{self._amount((work.done - work.repeated) / work.seconds)}/s"
        rate = f"{work.read['text_bytes'] / 1e6 / work.seconds:.1f} MB/s"
        if self._console.width < _BARS_FROM_COLUMNS:
            return rate
        tokens = f"{work.read['tokens'] / 1e6 / work.seconds:.2f} M tokens/s"
        return (
            f"{rate}  {tokens}"
            if self._console.is_terminal
            else f"{work.read['documents']:,} documents, {rate}, {tokens}"
        )

    def _print_line(self) -> None:
        is_done = self._work[_ALL].done >= self._work[_ALL].total  # `end_step` says so
        is_soon = time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES
        if self._console.is_terminal or is_done or is_soon:
            return
        self._last_line = time.monotonic()
        work = self._work[_ALL]
        self._print(f"{self._name}: {self._so_far(work)}, {work.left(self._last_line)}; {self._rates(work)}")

    def _print(self, line: str) -> None:
        self._console.print(shown(line), markup=False, highlight=False, soft_wrap=True)


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def observing(console: Console, *, are_listed: bool = True) -> Iterator[ConsoleObserver]:
    """Yield an observer that shows the progress on `console`.

    Args:
        are_listed: whether rejected documents are also written to rejected.jsonl.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24 if console.width >= _BARS_FROM_COLUMNS else 14),
        TextColumn("{task.fields[about]}", markup=False),
    )
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    observer = ConsoleObserver(console, bars, are_listed=are_listed)
    try:
        yield observer
        observer.end_step()
    finally:
        if console.is_terminal:
            bars.stop()
