"""Pages of the project: one HTML file each, with styles and scripts inside, that loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from streaming_rwkv.version import PROGRAM

_BEGIN = "<!doctype html><html lang='en'><meta charset='utf-8'>"


def render(title: str, body: str, data: Any, *, scripts: Sequence[str]) -> str:
    """Return a page.

    Args:
        body: HTML, which says that it was written `by` the program.
        data: JSON that the scripts read.
        scripts: names of files in this folder.
    """
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    code = "\n".join(_read(name) for name in scripts)
    return (
        f"{_BEGIN}<title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{_read('page.css')}</style>"
        f"<main>{body}</main><script type='application/json' id='data'>{content}</script>"
        f"<script>{code}</script></html>\n"
    )


def is_page(path: Path) -> bool:
    """Return whether a file is a page that this program wrote."""
    content = path.read_bytes()
    return content.startswith(_BEGIN.encode()) and f"by {PROGRAM} ".encode() in content


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
