"""Plots of one or more runs on a page: `python -m streaming_rwkv.plot RUN [RUN …] [--to FILE.html|.png]`.

Consecutive runs, such as stages 1 and 2, are plotted one after another over the tokens of all. Only `metrics.jsonl` is
read, so a run can be plotted during training and without its data.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaming_rwkv.extras import exit_if_missing

if __name__ == "__main__":
    exit_if_missing("numpy", "matplotlib", extra="train")  # before imports that would end in a traceback

import numpy as np
from numpy.typing import NDArray

from streaming_rwkv.config import UserError
from streaming_rwkv.console import print_error, shown, tolerate_any_encoding
from streaming_rwkv.filesystem import read_regular_file
from streaming_rwkv.location import checked_local

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

METRICS_NAME = "metrics.jsonl"
SUFFIXES = (".html", ".png")
# Paul Tol's "bright" and "muted" palettes, distinguishable on white with any colour vision.
COLORS = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#332288", "#999933", "#882255", "#44AA99"]
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
        lines = read_regular_file(file, most=LARGEST_METRICS_BYTES).decode(errors="replace").splitlines()
    except OSError as error:
        raise PlotError(f"{file}: cannot be read ({error.strerror}); give a run's save_folder") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_parse_line(line))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if number < len(lines):  # the last line may be incomplete
                raise PlotError(f"{file}: line {number} is no line of metrics: {line[:60]!r}") from None
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
        marks = []
        for before, run in self.parts():
            tokens, stages = run.series("stage")
            changes = np.flatnonzero(np.diff(stages)) + 1
            marks.append((before, f"{run.name}, stage {stages[0]:.0f}" if len(changes) else run.name, True))
            # A step's tokens are those after it: a stage begins where the step before its first ended.
            marks += [(before + float(tokens[i - 1]), f"stage {stages[i]:.0f}", False) for i in changes]
        return marks


# --- figures ---

Panel = Callable[["Axes"], None]


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


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name, in the order of COLORS."""
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def bucket_colors(buckets: Sequence[str]) -> dict[str, Any]:
    """Return colours from dark (short) to light (long), ordered in grey too; yellow is left out."""
    from matplotlib import colormaps

    return {
        name: colormaps["viridis"](0.9 * i / max(1, len(buckets) - 1))
        for i, name in enumerate(sorted(buckets, key=bucket_order))
    }


def learning_panels(history: History) -> dict[str, Panel]:
    """Return panels of losses and mixtures, by title, for the metrics that these runs logged."""
    sources = history.names("validation/loss/source/")
    buckets = history.names("validation/loss/bucket/")
    trained = [name.rsplit("/", 1) for name in history.names("share/")]
    # A source has the same colour in every panel, also if it is only validated.
    source_colors = colors_of(list(dict.fromkeys([*sources, *(source for source, _ in trained)])))
    colors_by_bucket = bucket_colors(list(dict.fromkeys([*buckets, *(bucket for _, bucket in trained)])))

    def lines(prefix: str, colors: Mapping[str, Any], unit: str) -> Panel:
        return lambda axes: draw_lines(axes, history, prefix, colors, unit)

    found: dict[str, Panel] = {}
    if sources:
        found["Validation loss by source"] = lines("validation/loss/source/", source_colors, "nats per token")
        found["Validation loss by bucket"] = lines("validation/loss/bucket/", colors_by_bucket, "nats per token")
    if history.names("validation/bits_per_byte/source/"):
        bits = lines("validation/bits_per_byte/source/", source_colors, "bits per byte of text")
        found["Validation bits per byte by source"] = bits
    scores = [name for name in history.names("tasks/") if name.endswith(("/acc", "/exact_match"))]
    if scores:
        found["Standard tasks"] = lines("tasks/", colors_of(scores), "share of answers that are right")
    if trained:
        found["Mixture consumed, by source"] = lambda axes: draw_mixture(axes, history, source_colors, by=0)
        found["Mixture consumed, by bucket"] = lambda axes: draw_mixture(axes, history, colors_by_bucket, by=1)
    return found


def running_panels(history: History) -> dict[str, Panel]:
    """Return panels of the course of training, by title."""

    def single(metric: str, unit: str, scale: str) -> Panel:
        return lambda axes: draw_single(axes, history, metric, unit=unit, scale=scale)

    every = {
        "Learning rate": ("optimizer/lr", "learning rate", "linear"),
        "Gradient norm, before clipping": ("optimizer/gradient_norm", "norm", "log"),
        "Throughput": ("throughput/tokens_per_second", "tokens per second", "linear"),
        "Model FLOPs utilization": ("throughput/mfu", "share of the device's peak", "linear"),
        "Time spent waiting for data": ("throughput/waiting_for_data", "share of time", "linear"),
    }
    return {title: single(*about) for title, about in every.items() if history.curves(about[0])}


def draw_training_loss(axes: Axes, history: History) -> None:
    """Plot the training loss of each step, its running mean, and the validation loss."""
    label: str | None = "each step"
    for tokens, values in history.curves("loss/train/total"):
        axes.plot(*thin(tokens, values), color=COLORS[0], alpha=0.3, linewidth=0.8, label=label)
        window = max(1, len(values) // 40)
        axes.plot(*thin(tokens, smooth(values, window)), color=COLORS[0], linewidth=1.8, label=label and "smoothed")
        label = None
    for i, (tokens, values) in enumerate(history.curves("validation/loss/all")):
        axes.plot(tokens, values, "o-", color=COLORS[1], markersize=4, label=None if i else "validation, all")
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1))


def draw_lines(axes: Axes, history: History, prefix: str, colors: Mapping[str, Any], unit: str) -> None:
    """Plot a curve for each name, with its last value in the legend."""
    for name, color in colors.items():
        curves = history.curves(prefix + name)
        for i, (tokens, values) in enumerate(curves):
            label = f"{name}: {values[-1]:.3f}" if i == len(curves) - 1 else None
            axes.plot(tokens, values, "o-", color=color, markersize=3, linewidth=1.5, label=label)
    axes.set_ylabel(unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), title="last value")


def draw_single(axes: Axes, history: History, metric: str, *, unit: str, scale: str) -> None:
    """Plot one metric; a linear scale starts at 0."""
    for tokens, values in history.curves(metric):
        dense = len(values) > 100
        axes.plot(*thin(tokens, values), color=COLORS[0], linewidth=0.8 if dense else 1.4)
    axes.set_yscale(scale)
    axes.set_ylabel(unit)
    if scale == "linear":
        axes.set_ylim(bottom=0)


def draw_mixture(axes: Axes, history: History, colors: Mapping[str, Any], *, by: int) -> None:
    """Plot the stacked shares of the consumed tokens; `by` as for `mixture`."""
    drawn: set[str] = set()
    for before, run in history.parts():
        edges, shares = mixture(run, by=by)
        bottom = np.zeros(len(edges) - 1)
        for name, color in colors.items():
            if name not in shares or not shares[name].any():
                continue
            top = bottom + shares[name]
            label = None if name in drawn else name
            axes.stairs(top, before + edges, baseline=bottom, fill=True, color=color, label=label)
            bottom = top
            drawn.add(name)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of tokens")
    handles, labels = axes.get_legend_handles_labels()
    # In the order of the stack, from the top.
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1))


def draw(history: History) -> Figure:
    """Return a figure 1,200 pixels wide: the training loss across it, and below it the other panels."""
    # Not pyplot, which would keep the figure and choose a window system.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    columns = [list(learning_panels(history).items()), list(running_panels(history).items())]
    if not all(columns):
        columns = [[*columns[0], *columns[1]]]
    rows = 1 + max(map(len, columns))
    figure = Figure(figsize=(12, 3.0 * rows), dpi=100, layout="constrained")
    grid = figure.add_gridspec(rows, len(columns))
    placed = [(grid[0, :], "Training loss", lambda axes: draw_training_loss(axes, history))]
    placed += [
        (grid[1 + row, column], *panel) for column, found in enumerate(columns) for row, panel in enumerate(found)
    ]
    marks = history.marks()
    end = sum(run.total_tokens for run in history.runs)
    for place, title, panel in placed:
        axes = figure.add_subplot(place)
        panel(axes)
        first = place is placed[0][0]
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20 if first else 6)
        axes.set_xlim(0, max(1.0, end))
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for at, label, begins_run in marks:
            if at > 0:
                axes.axvline(at, color="#444444", linewidth=1.0, linestyle="-" if begins_run else (0, (4, 3)))
            if first:
                axes.annotate(
                    label, (at, 1), xycoords=("data", "axes fraction"), xytext=(2, 4), textcoords="offset points",
                    fontsize=8.5, color="#444444", fontweight="bold" if begins_run else "normal",
                )  # fmt: skip
    return figure


# --- the page ---


def summary(history: History) -> list[list[str]]:
    """Return a row for each run: its progress and its last values."""
    rows = [["run", "steps", "tokens", "training loss", "validation loss", "bits per byte", "tokens / s, median"]]
    for run in history.runs:
        loss = run.series("loss/train/total")[1]
        loss = loss[np.isfinite(loss)]
        last = [run.series(f"validation/{name}/all")[1][-1:] for name in ("loss", "bits_per_byte")]
        rate = run.series("throughput/tokens_per_second")[1]
        rows.append(
            [
                run.name,
                f"{run.last_step:,}",
                f"{run.total_tokens:,.0f}",
                f"{loss[-max(1, len(loss) // 40) :].mean():.4f}" if len(loss) else "–",
                *(f"{value[0]:.4f}" if len(value) else "–" for value in last),
                f"{np.median(rate):,.0f}" if len(rate) else "–",
            ]
        )
    return rows


def last_validation(run: Run) -> list[list[str]]:
    """Return loss, perplexity and bits per byte of each source and bucket at the run's last evaluation."""
    latest: dict[str, Any] = {}
    for row in run.rows:
        if any(name.startswith("validation/") for name in row):
            latest = row
    return validation_rows(latest, title=f"{run.name}, step {latest['step']:,}") if latest else []


def validation_rows(metrics: Mapping[str, Any], *, title: str) -> list[list[str]]:
    """Return a heading, and one row each for all packs, every source, bucket and range of positions in `metrics`."""
    prefix = "validation/loss/"
    groups = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    shown = [name for name in groups if name.startswith(("source/", "bucket/"))]
    shown.sort(key=lambda name: (name.startswith("bucket/"), bucket_order(name[7:]) if name[0] == "b" else 0, name))
    kinds = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    rows = [[title, *kinds.values()]]
    for name in ["all", *shown]:
        values = [(kind, metrics.get(f"validation/{kind}/{name}")) for kind in kinds]
        rows.append(
            [name.replace("/", " "), *("–" if value is None else _shown(kind, value) for kind, value in values)]
        )
    prefix = "validation/loss_by_position/"
    for name, loss in metrics.items():  # in their order
        if name.startswith(prefix):
            perplexity = math.exp(min(700.0, loss))
            label = f"position {name.removeprefix(prefix)}"
            rows.append([label, _shown("loss", loss), _shown("perplexity", perplexity), "–"])
    return rows


def _shown(kind: str, value: float) -> str:
    if kind != "perplexity":
        return f"{value:.4f}"
    return f"{value:#.4g}".rstrip(".") if value < 10_000 else f"{value:.0f}"  # four significant digits


def page(history: History, figure: Figure) -> str:
    """Return one HTML file without references to other files."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :]
    title = html.escape(" → ".join(run.name for run in history.runs))
    details = "".join(_table(rows) for run in history.runs if (rows := last_validation(run)))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
        f"<main><h1>{title}</h1>{_table(summary(history))}{svg}"
        f"<h2>Last evaluation</h2><div class='side'>{details}</div></main></html>\n"
    )


def _table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    names = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"


# Always light, since the colours of the curves are chosen for white.
_STYLE = """
body{margin:0;background:#fff;color:#1c2330;font:15px/1.5 system-ui,"Noto Sans","Noto Sans CJK SC",sans-serif}
main{max-width:1200px;margin:0 auto;padding:24px}h1{font-size:24px;margin:0 0 12px}h2{font-size:17px}
svg{width:100%;height:auto;display:block;margin:20px 0}.side{display:flex;flex-wrap:wrap;gap:12px 56px}
table{border-collapse:collapse;font-size:13px;align-self:start}
td,th{padding:4px 0 4px 28px;border-bottom:1px solid #e3e7ee;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left;padding-left:0}
"""


_DRAWING: Any = {
    "svg.fonttype": "none",  # keeps text as text
    "svg.hashsalt": "streaming-rwkv",  # the same bytes for the same metrics
    "text.parse_math": False,  # a `$` in the name of a run or a source is a `$`
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def write_plot(runs: Sequence[str | Path], *, to: str | Path) -> None:
    """Plot runs in their order.

    Args:
        runs: save folders.
        to: a .html or .png file.
    Raises:
        LocationError: a run or `to` that is not on this machine's disks.
        PlotError: see the class.
    """
    runs = [checked_local(run, remedy="copy its metrics.jsonl to this machine") for run in runs]
    to = Path(checked_local(to))
    if to.suffix not in SUFFIXES:
        raise PlotError(f"{to}: found suffix {to.suffix!r}, expected {' or '.join(SUFFIXES)}")
    history = History(runs=[read_run(run) for run in runs])
    from matplotlib import rc_context

    with rc_context(_DRAWING), warnings.catch_warnings():
        # matplotlib measures names outside its font badly; the page shows them as text.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        figure = draw(history)
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.suffix == ".png":
            figure.savefig(to, format="png")
        else:
            to.write_text(page(history, figure), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m streaming_rwkv.plot`, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m streaming_rwkv.plot", description="Draw a run, or several.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="save folders, in the order in which they were trained")
    parser.add_argument("--to", metavar="FILE", help=".html or .png (default: plot.html in the last RUN)")
    options = parser.parse_args(arguments)
    tolerate_any_encoding()
    to = options.to or f"{options.runs[-1].rstrip('/')}/plot.html"
    try:
        write_plot(options.runs, to=to)
    except UserError as error:
        print_error(error)
        return 1
    print(f"wrote {shown(str(to))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
