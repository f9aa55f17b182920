"""Panels of a plot as data, which the picture and the page both draw."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from streaming_rwkv.plotting.runs import Floats, History, Run, bucket_order, mixture, smooth, thin

# Paul Tol's "bright" and "muted" palettes, distinguishable on white and on black with any colour vision.
COLORS = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#6655BB", "#999933", "#BB5566", "#44AA99"]
_FEW_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve in parts, each (x, y); of areas, x are the edges of the steps y."""

    name: str
    color: str
    parts: list[tuple[Floats, Floats]]
    is_faint: bool = False
    has_points: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: curves, or areas that are stacked."""

    title: str
    unit: str
    series: list[Series]
    kind: Literal["lines", "areas"] = "lines"
    scale: Literal["linear", "log"] = "linear"
    from_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Everything of a plot but its tables."""

    title: str
    panels: list[Panel]
    end: float  # of the x axis, in tokens
    marks: list[tuple[float, str, bool]] = field(default_factory=list)  # see `History.marks`


_RUNNING = (
    ("Learning rate", "optimizer/lr", "learning rate", "linear"),
    ("Gradient norm, before clipping", "optimizer/gradient_norm", "norm", "log"),
    ("Throughput", "throughput/tokens_per_second", "tokens per second", "linear"),
    ("Model FLOPs utilization", "throughput/mfu", "share of the device's peak", "linear"),
    ("Time spent waiting for data", "throughput/waiting_for_data", "share of time", "linear"),
)


def consecutive(history: History) -> Plot:
    """Return the plot of runs that continue each other."""
    return Plot(
        title=" → ".join(run.name for run in history.runs),
        panels=[_training_loss(history), *_learning(history), *_running(history)],
        end=sum(run.total_tokens for run in history.runs),
        marks=history.marks(),
    )


def overlaid(runs: Sequence[Run]) -> Plot:
    """Return the plot of runs that are compared: each begins at 0, and has one color in all panels."""
    names = _distinct(runs)
    shown = list(zip(names, COLORS * (1 + len(runs) // len(COLORS)), runs, strict=False))

    def panel(title: str, metric: str, unit: str, *, scale: str = "linear", is_smooth: bool = False) -> Panel:
        series = []
        for name, color, run in shown:
            tokens, values = run.series(metric)
            if len(values):
                smoothed = smooth(values, max(1, len(values) // 40)) if is_smooth else values
                has_points = len(values) < _FEW_POINTS and metric.startswith("validation/")
                series.append(Series(name=name, color=color, parts=[thin(tokens, smoothed)], has_points=has_points))
        return Panel(
            title=title, unit=unit, series=series, scale="log" if scale == "log" else "linear",
            from_zero=scale == "linear" and not metric.startswith(("loss/", "validation/")),
        )  # fmt: skip

    history = History(runs=list(runs))
    panels = [
        panel("Training loss, smoothed", "loss/train/total", "nats per token", is_smooth=True),
        panel("Validation loss", "validation/loss/all", "nats per token"),
        panel("Validation bits per byte", "validation/bits_per_byte/all", "bits per byte of text"),
    ]
    for source in history.names("validation/loss/source/"):
        panels.append(panel(f"Validation loss, {source}", f"validation/loss/source/{source}", "nats per token"))
    for score in history.names("tasks/"):
        if score.endswith(("/acc", "/exact_match")):
            panels.append(panel(f"Task {score}", f"tasks/{score}", "share of answers that are right"))
    panels += [panel(title, metric, unit, scale=scale) for title, metric, unit, scale in _RUNNING]
    return Plot(
        title=" and ".join(names),
        panels=[panel for panel in panels if panel.series],
        end=max(run.total_tokens for run in runs),
    )


def _distinct(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, numbered where several have the same."""
    names = [run.name for run in runs]
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def _training_loss(history: History) -> Panel:
    curves = history.curves("loss/train/total")
    smoothed = [(tokens, smooth(values, max(1, len(values) // 40))) for tokens, values in curves]
    series = [
        Series(name="each step", color=COLORS[0], parts=[thin(*curve) for curve in curves], is_faint=True),
        Series(name="smoothed", color=COLORS[0], parts=[thin(*curve) for curve in smoothed]),
    ]
    if validation := history.curves("validation/loss/all"):
        series.append(Series(name="validation, all", color=COLORS[1], parts=validation, has_points=True))
    return Panel(title="Training loss", unit="nats per token", series=series)


def _learning(history: History) -> list[Panel]:
    """Return panels of losses and mixtures, for the metrics that these runs logged."""
    sources = history.names("validation/loss/source/")
    buckets = history.names("validation/loss/bucket/")
    trained = [name.rsplit("/", 1) for name in history.names("share/")]
    # A source has the same colour in every panel, also if it is only validated.
    source_colors = colors_of(list(dict.fromkeys([*sources, *(source for source, _ in trained)])))
    colors_by_bucket = bucket_colors([*buckets, *(bucket for _, bucket in trained)])

    def lines(title: str, prefix: str, colors: Mapping[str, str], unit: str) -> Panel:
        series = [
            Series(name=name, color=color, parts=curves, has_points=True)
            for name, color in colors.items()
            if (curves := history.curves(prefix + name))
        ]
        if len(series) > 1 and (every := history.curves(prefix.rsplit("/", 2)[0] + "/all")):
            series.append(Series(name="all", color="#888888", parts=every, has_points=True))
        return Panel(title=title, unit=unit, series=series)

    panels = []
    if sources:
        panels.append(lines("Validation loss by source", "validation/loss/source/", source_colors, "nats per token"))
        panels.append(lines("Validation loss by bucket", "validation/loss/bucket/", colors_by_bucket, "nats per token"))
    if history.names("validation/bits_per_byte/source/"):
        prefix = "validation/bits_per_byte/source/"
        panels.append(lines("Validation bits per byte by source", prefix, source_colors, "bits per byte of text"))
    scores = [name for name in history.names("tasks/") if name.endswith(("/acc", "/exact_match"))]
    if scores:
        panels.append(lines("Standard tasks", "tasks/", colors_of(scores), "share of answers that are right"))
    if trained:
        panels.append(_mixture(history, "Mixture consumed, by source", source_colors, by=0))
        panels.append(_mixture(history, "Mixture consumed, by bucket", colors_by_bucket, by=1))
    return panels


def _mixture(history: History, title: str, colors: Mapping[str, str], *, by: int) -> Panel:
    """Return the shares of the consumed tokens; `by` as for `mixture`."""
    parts: dict[str, list[tuple[Floats, Floats]]] = {}
    bins = [(before, *mixture(run, by=by)) for before, run in history.parts()]
    used = [name for name in colors if any(shares.get(name, np.zeros(1)).any() for _, _, shares in bins)]
    for name in used:
        parts[name] = [
            (before + edges, shares.get(name, np.zeros(len(edges) - 1)))
            for before, edges, shares in bins
            if len(edges) > 1
        ]
    series = [Series(name=name, color=colors[name], parts=parts[name]) for name in used]
    return Panel(title=title, unit="share of tokens", series=series, kind="areas")


def _running(history: History) -> list[Panel]:
    """Return panels of the course of training."""
    return [
        Panel(
            title=title,
            unit=unit,
            series=[Series(name=unit, color=COLORS[0], parts=[thin(*curve) for curve in curves])],
            scale="log" if scale == "log" else "linear",
            from_zero=scale == "linear",
        )
        for title, metric, unit, scale in _RUNNING
        if (curves := history.curves(metric))
    ]


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name, in the order of COLORS."""
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def bucket_colors(buckets: Sequence[str]) -> dict[str, str]:
    """Return colours of the buckets by length, from violet (short) to yellow (long), visible on white and on black."""
    ordered = sorted(set(buckets), key=bucket_order)
    colors = {}
    for place, name in enumerate(ordered):
        part = place / max(1, len(ordered) - 1)
        red, green, blue = colorsys.hls_to_rgb(0.75 - 0.6 * part, 0.5, 0.5)
        colors[name] = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return colors
