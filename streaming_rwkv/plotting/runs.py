"""Runs as they are plotted: their metrics over the tokens trained on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import read_regular_file

Floats = NDArray[np.float64]

METRICS_NAME = "metrics.jsonl"
MOST_POINTS = 2000  # of one curve: more than a page has pixel columns
MIXTURE_BINS = 60
LARGEST_METRICS_BYTES = 1 << 33
LARGEST_STEP = 1 << 53
LARGEST_NUMBER = 1e100  # of a metric; squares and sums of larger ones are not finite


class PlotError(UserError):
    """Runs that cannot be plotted, or a file that cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Metrics of a run, in the order of its steps."""

    name: str
    rows: list[dict[str, Any]]
    known_steps: Floats  # (K,) steps after which `known_tokens` (K,) had been trained on
    known_tokens: Floats

    def tokens_after(self, steps: Sequence[float]) -> Floats:
        """Return the tokens trained on after these steps; after the last known step they are extrapolated."""
        known, tokens = self.known_steps, self.known_tokens
        pace = (tokens[-1] - tokens[-2]) / (known[-1] - known[-2]) if len(known) > 1 else 0.0
        beyond = np.maximum(0.0, np.asarray(steps, np.float64) - known[-1])
        return np.interp(steps, known, tokens) + pace * beyond

    def series(self, metric: str) -> tuple[Floats, Floats]:
        """Return (tokens, values) of the steps at which the metric was logged."""
        found = [(row["step"], row[metric]) for row in self.rows if metric in row]
        steps, values = ([pair[i] for pair in found] for i in (0, 1))
        return self.tokens_after(steps), np.array(values, np.float64)

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def total_tokens(self) -> float:
        return float(self.tokens_after([self.last_step])[0])


def read_run(path: str | Path) -> Run:
    """Read a run from its save folder or its metrics file.

    Raises:
        PlotError: no metrics there, or lines that are none.
    """
    path = Path(path)
    file = path / METRICS_NAME if path.is_dir() else path
    try:
        content = read_regular_file(file, most=LARGEST_METRICS_BYTES, follow=False).decode(errors="replace")
    except OSError as error:
        raise PlotError(f"{file}: cannot be read ({error.strerror}); give a run's save_folder") from None
    lines = content.removesuffix("\n").split("\n")  # not by `splitlines`: JSON may hold other ends of lines
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_parse_line(line))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if number < len(lines):  # the last line may be incomplete
                raise PlotError(f"{file}: line {number} is no line of metrics: {line[:60]!r}; remove it") from None
    # Composer logs, with a step, the tokens before it.
    known = {row["step"] - 1: row["time/token"] for row in rows if row.get("time/token", -1) >= 0}
    if not known:
        raise PlotError(f"{file}: no step was logged yet")
    return Run(
        name=file.resolve().parent.name,
        rows=rows,
        known_steps=np.array(list(known), np.float64),
        known_tokens=np.array(list(known.values())),
    )


def _parse_line(line: str) -> dict[str, Any]:
    """Return the step and the numbers of a line; null, for a number that was not finite, is NaN."""
    row = json.loads(line)
    step = int(row["step"])
    if not 0 <= step < LARGEST_STEP:
        raise ValueError(step)
    metrics = {}
    for name, value in row.items():
        name.encode()  # raises for a lone surrogate
        if name.startswith("share/") and name.count("/") < 2:
            raise ValueError(name)  # expected share/SOURCE/BUCKET
        if isinstance(value, list):  # of a tensor, which is not plotted
            continue
        if not isinstance(value, int | float | None):
            raise TypeError(name)
        number = math.nan if value is None else float(value)
        metrics[name] = number if abs(number) < LARGEST_NUMBER else math.nan
    return {**metrics, "step": step}


@dataclass(frozen=True, kw_only=True)
class History:
    """Consecutive runs: the tokens of each run continue those of the run before."""

    runs: list[Run]

    def parts(self) -> Iterator[tuple[float, Run]]:
        """Return each run and the tokens before it."""
        before = 0.0
        for run in self.runs:
            yield before, run
            before += run.total_tokens

    def curves(self, metric: str) -> list[tuple[Floats, Floats]]:
        """Return (tokens, values) of each run that logged the metric."""
        found = [(before, *run.series(metric)) for before, run in self.parts()]
        return [(before + tokens, values) for before, tokens, values in found if len(values)]

    def names(self, prefix: str) -> list[str]:
        """Return the rest of the names of metrics after `prefix`, in the order in which they were first logged."""
        every = (name for run in self.runs for row in run.rows for name in row)
        return list(dict.fromkeys(name.removeprefix(prefix) for name in every if name.startswith(prefix)))

    def marks(self) -> list[tuple[float, str, bool]]:
        """Return the beginnings of runs and of their curriculum stages: tokens, label, and True for a run."""
        marks: list[tuple[float, str, bool]] = []
        for before, run in self.parts():
            tokens, stages = run.series("stage")
            changes = np.flatnonzero(np.diff(stages)) + 1
            marks.append((before, f"{run.name}, stage {stages[0]:.0f}" if len(changes) else run.name, True))
            # A step's tokens are those after it: a stage begins where the step before its first ended.
            marks += [(before + float(tokens[i - 1]), f"stage {stages[i]:.0f}", False) for i in changes]
        return marks


def bucket_order(bucket: str) -> int:
    """Return the sort key of a bucket such as `1-256`: its shortest length; 0 for another name."""
    found = re.match(r"[0-9]{1,18}(?=-|$)", bucket)
    return int(found[0]) if found else 0


def smooth(values: Floats, window: int) -> Floats:
    """Return the mean of each value and its neighbours within half a window to either side.

    Values that are not finite are left out: a step that was skipped for its gradient may have no loss.
    """
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    means: Floats = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return means


def thin(tokens: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Reduce a curve to at most MOST_POINTS points, each the mean of its neighbours."""
    if len(values) <= MOST_POINTS:
        return tokens, values
    edges = np.linspace(0, len(values), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff(edges, append=len(values))
    finite = np.isfinite(values)
    sums, known = np.add.reduceat(np.where(finite, values, 0.0), edges), np.add.reduceat(finite.astype(int), edges)
    means = np.divide(sums, known, out=np.full(len(edges), np.nan), where=known > 0)
    return np.add.reduceat(tokens, edges) / counts, means


def mixture(run: Run, *, by: int) -> tuple[Floats, dict[str, Floats]]:
    """Return edges (B + 1,) in tokens, and the consumed share (B,) of each source (`by` 0) or bucket (`by` 1).

    The run logs shares of all tokens consumed so far; the consumption between two points is their difference.
    """
    names = sorted({name for row in run.rows for name in row if name.startswith("share/")})
    rows = [row for row in run.rows if names and any(name in row for name in names)]
    points = np.concatenate([[0.0], run.tokens_after([row["step"] for row in rows])])
    edges = points if len(rows) <= MIXTURE_BINS else np.linspace(0, points[-1], MIXTURE_BINS + 1)
    shares: dict[str, Floats] = {}
    for name in names:
        group = name.removeprefix("share/").rsplit("/", 1)[by]
        consumed = points * np.array([0.0, *(row.get(name, 0.0) for row in rows)])
        share = np.diff(np.interp(edges, points, consumed)) / np.maximum(np.diff(edges), 1e-9)
        shares[group] = shares.get(group, np.zeros(len(edges) - 1)) + share
    return edges, shares
