"""The page of a plot: curves that a browser draws, with values under the pointer, and tables."""

from __future__ import annotations

import html
import math
from typing import Any

from streaming_rwkv.pages import render
from streaming_rwkv.plotting.panels import Panel, Plot
from streaming_rwkv.plotting.runs import Floats

_DIGITS = 6


Tables = list[tuple[str, list[list[str]]]]
"""Headings, and rows of which the first has the names of the columns."""


def plot_page(plot: Plot, *, about: str, before: Tables, after: Tables) -> str:
    """Return one HTML file without references to other files.

    Args:
        about: a line below the title.
        before: tables above the curves.
        after: tables below them.
    """
    data = {
        "end": plot.end,
        "marks": [{"x": at, "label": label, "run": is_run} for at, label, is_run in plot.marks],
        "panels": [_panel(panel) for panel in plot.panels],
    }
    controls = (
        "<p class='controls'><label><input type='checkbox' id='log'> logarithmic losses</label> "
        "<label>smooth the training loss <input type='range' id='smooth' min='0' max='100' value='0'></label></p>"
    )
    panels = f"{controls}<div class='panels' id='panels'></div>"
    last = f"<div class='panels'>{_sections(after)}</div>"
    head = f"<h1>{html.escape(plot.title)}</h1><p class='quiet'>{html.escape(about)}</p>"
    body = f"{head}{_sections(before)}{panels}{last}"
    return render(plot.title, body, data, scripts=["charts.js", "plot.js"])


def _sections(tables: Tables) -> str:
    return "".join(f"<section><h2>{html.escape(title)}</h2>{_table(rows)}</section>" for title, rows in tables)


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "unit": panel.unit,
        "kind": panel.kind,
        "log": panel.scale == "log",
        "zero": panel.from_zero,
        "series": [
            {
                "name": series.name,
                "color": series.color,
                "faint": series.is_faint,
                "dots": series.has_points,
                "parts": [[_numbers(x), _numbers(y)] for x, y in series.parts],
            }
            for series in panel.series
        ],
    }


def _numbers(values: Floats) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    names = "".join(f"<th class='number'>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td class=number>{cell}</td>' for cell in row)}</tr>" for row in body)
    return (
        f"<div class='scroll'><table class='named'><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
