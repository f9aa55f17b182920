"""The picture of a plot, drawn by matplotlib."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streaming_rwkv.plotting.panels import Panel, Plot
from streaming_rwkv.version import PROGRAM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_WIDTH = 0.0085  # of a bold character, as a share of the width of the axes beside a legend
_MARK_WITHIN = 1024  # bytes: texts are the first of a PNG's chunks
_DRAWING: Any = {
    "text.parse_math": False,  # a `$` in the name of a run or a source is a `$`
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def write_picture(plot: Plot, to: Path) -> None:
    """Write a picture 1,200 pixels wide."""
    from matplotlib import rc_context

    with rc_context(_DRAWING), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        draw(plot).savefig(to, format="png", metadata={"Software": PROGRAM})


def is_picture(path: Path) -> bool:
    """Return whether a file is a picture that this program wrote."""
    with path.open("rb") as file:
        return f"Software\0{PROGRAM}".encode() in file.read(_MARK_WITHIN)


def draw(plot: Plot) -> Figure:
    """Return a figure: the first panel across it, and the others below it in two columns."""
    # Not pyplot, which would keep the figure and choose a window system.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    first, *others = plot.panels
    rows = 1 + -(-len(others) // 2)
    figure = Figure(figsize=(12, 3.0 * rows + 0.4), dpi=100, layout="constrained")
    figure.suptitle(plot.title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(rows, 2)
    places = [grid[0, :], *(grid[1 + index // 2, index % 2] for index in range(len(others)))]
    for place, panel in zip(places, [first, *others], strict=True):
        axes = figure.add_subplot(place)
        _draw_panel(axes, panel)
        is_first = panel is first
        marks = plot.marks
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=20 if is_first and marks else 6)
        axes.set_xlim(0, max(1.0, plot.end))
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if panel.unit.startswith("share"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for at, _, begins_run in marks:
            if at > 0:
                axes.axvline(at, color="#444444", linewidth=1.0, linestyle="-" if begins_run else (0, (4, 3)))
        for at, label, begins_run in labels_with_room(plot) if is_first else ():
            axes.annotate(
                label, (at, 1), xycoords=("data", "axes fraction"), xytext=(2, 4), textcoords="offset points",
                fontsize=8.5, color="#444444", fontweight="bold" if begins_run else "normal",
            )  # fmt: skip
    return figure


def labels_with_room(plot: Plot) -> list[tuple[float, str, bool]]:
    """Return the marks whose labels do not overlap; those of runs go before those of stages."""
    end = max(1.0, plot.end)
    shown: list[tuple[float, float, tuple[float, str, bool]]] = []
    for mark in sorted(plot.marks, key=lambda mark: not mark[2]):
        begin = mark[0] / end
        until = begin + _LABEL_WIDTH * (len(mark[1]) + 1)
        if all(until <= other_begin or begin >= other_until for other_begin, other_until, _ in shown):
            shown.append((begin, until, mark))
    return sorted(mark for _, _, mark in shown)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    if panel.kind == "areas":
        _draw_areas(axes, panel)
        return
    for series in panel.series:
        last = series.parts[-1][1][-1]
        label: str | None = f"{series.name}: {last:.3f}" if series.has_points else series.name
        for x, y in series.parts:
            axes.plot(
                x, y, "o-" if series.has_points else "-", color=series.color, alpha=0.45 if series.is_faint else 1,
                linewidth=0.8 if series.is_faint or (len(y) > 100 and panel.scale == "log") else 1.5, markersize=3,
                label=label,
            )  # fmt: skip
            label = None
    axes.set_yscale(panel.scale)
    if panel.scale == "log":
        from matplotlib.ticker import EngFormatter, NullFormatter

        axes.yaxis.set_major_formatter(EngFormatter(sep=""))  # the default is mathematics, which is not parsed here
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(panel.unit)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(panel.series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1))


def _draw_areas(axes: Axes, panel: Panel) -> None:
    bottoms = [np.zeros(len(edges) - 1) for edges, _ in panel.series[0].parts] if panel.series else []
    for series in panel.series:
        label: str | None = series.name
        for part, (edges, shares) in enumerate(series.parts):
            top = bottoms[part] + shares
            axes.stairs(top, edges, baseline=bottoms[part], fill=True, color=series.color, label=label)
            bottoms[part], label = top, None
    axes.set_ylim(0, 1)
    axes.set_ylabel(panel.unit)
    handles, labels = axes.get_legend_handles_labels()
    # In the order of the stack, from the top.
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1))
