"""Bar charts as SVG text, without a plotting library."""

from __future__ import annotations

import html
from collections.abc import Mapping

PALETTE = ["#3b6fd8", "#e08a2c", "#2f9e78", "#c8455b", "#7a5ac8", "#3aa5c4", "#9a7b1c", "#d05fa6"]
_LEFT, _BOTTOM, _TOP, _RIGHT = 58, 40, 10, 12


def short(value: float) -> str:
    """Format a number with three digits and a unit: 1.2k, 3.4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def histogram(
    counts: Mapping[str, float], *, color: str, x_name: str, y_name: str, width: int = 1120, height: int = 220
) -> str:
    """Draw a bar for each entry, in order."""
    series = {name: {"": count} for name, count in counts.items()}
    return grouped_bars(series, colors={"": color}, x_name=x_name, y_name=y_name, width=width, height=height)


def grouped_bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    colors: Mapping[str, str],
    x_name: str,
    y_name: str,
    width: int = 1120,
    height: int = 280,
) -> str:
    """Draw a stacked bar for each group, its parts in the order of `colors`."""
    totals = {name: sum(parts.values()) for name, parts in groups.items()}
    highest = max(totals.values(), default=0) or 1
    plot_width, plot_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    step = plot_width / max(1, len(groups))
    every = max(1, round(46 / step))
    shapes = [_grid_line(part, highest, plot_height, width) for part in (0, 0.25, 0.5, 0.75, 1)]
    for place, (name, parts) in enumerate(groups.items()):
        left, base = _LEFT + place * step, float(_TOP + plot_height)
        for part, color in colors.items():
            if value := parts.get(part, 0):
                size = value / highest * plot_height
                base -= size
                about = html.escape(f"{name} {part}: {value:,.0f}")
                shapes.append(
                    f"<rect x='{left + step * 0.08:.1f}' y='{base:.1f}' width='{step * 0.84:.1f}' "
                    f"height='{size:.1f}' fill='{color}'><title>{about}</title></rect>"
                )
        if place % every == 0:
            shapes.append(
                f"<text x='{left + step / 2:.1f}' y='{height - 24}' text-anchor='middle'>{html.escape(name)}</text>"
            )
    shapes.append(
        f"<text x='{_LEFT + plot_width / 2}' y='{height - 6}' text-anchor='middle'>{html.escape(x_name)}</text>"
    )
    middle = _TOP + plot_height / 2
    turned = f"x='12' y='{middle}' text-anchor='middle' transform='rotate(-90 12 {middle})'"
    shapes.append(f"<text {turned}>{html.escape(y_name)}</text>")
    return _svg(shapes, width, height)


def bars(counts: Mapping[str, float], *, color: str, width: int = 1120) -> str:
    """Draw a horizontal bar for each entry, with its name and value."""
    highest = max(counts.values())
    shapes = []
    for row, (name, value) in enumerate(counts.items()):
        y, size = 8 + row * 24, value / highest * (width - 340)
        shapes.append(f"<text x='232' y='{y + 12}' text-anchor='end'>{html.escape(name)}</text>")
        shapes.append(f"<rect x='240' y='{y}' width='{max(size, 1):.1f}' height='16' rx='3' fill='{color}'/>")
        shapes.append(f"<text x='{246 + size:.1f}' y='{y + 12}'>{value:,}</text>")
    return _svg(shapes, width, 16 + 24 * len(counts))


def legend(colors: Mapping[str, str]) -> str:
    """Draw the name of each color."""
    entries = "".join(
        f"<span><i style='background:{color}'></i>{html.escape(name)}</span>" for name, color in colors.items()
    )
    return f"<div class='legend'>{entries}</div>"


def _grid_line(part: float, highest: float, plot_height: float, width: int) -> str:
    y = _TOP + plot_height * (1 - part)
    return (
        f"<line x1='{_LEFT}' x2='{width - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{short(part * highest)}</text>"
    )


def _svg(shapes: list[str], width: int, height: int) -> str:
    return f"<svg viewBox='0 0 {width} {height}' role='img'>{''.join(shapes)}</svg>"
