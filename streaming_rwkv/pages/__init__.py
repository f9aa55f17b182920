"""Pages of the project: one HTML file each, with styles and scripts inside, that loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any


def render(title: str, body: str, data: Any, *, scripts: Sequence[str]) -> str:
    """Return a page.

    Args:
        body: HTML.
        data: JSON that the scripts read.
        scripts: names of files in this folder.
    """
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    code = "\n".join(_read(name) for name in scripts)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{_read('page.css')}</style>"
        f"<main>{body}</main><script type='application/json' id='data'>{content}</script>"
        f"<script>{code}</script></html>\n"
    )


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
