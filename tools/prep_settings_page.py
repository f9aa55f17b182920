"""Generate docs/prep_settings.md: all settings of a recipe, as the configuration classes declare them.

python -m tools.prep_settings_page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from prep.config import DecontaminationConfig, PrepConfig, SourceConfig
from streaming_rwkv.config import Config
from tools.settings_page import declared

PAGE = Path(__file__).parents[1] / "docs" / "prep_settings.md"
HEAD = """\
# Settings of a recipe

Every key of a recipe, and of `key=value` after it on the command line. Generated from the classes that declare them by
`python -m tools.prep_settings_page`; a test fails when the page is out of date. How a recipe is used:
[preparation](preparation.md).

Numbers of tokens are at most 10¹⁵, and sizes 2⁶⁰ bytes.
"""


def rows(config: type[Config]) -> Iterator[str]:
    """Yield the lines of the table of one configuration."""
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    written = declared(config)
    for name, field in config.model_fields.items():
        kind, text = written[name]
        default = "**required**" if field.is_required() else "–" if field.default is None else f"`{field.default}`"
        cells = [f"`{name}`", re.sub(r"\b\w+Config\b", "section", kind), default, text]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Return the content of docs/prep_settings.md."""
    parts = [HEAD]
    sections = {"At the top": PrepConfig, "`sources.NAME`": SourceConfig, "`decontaminate`": DecontaminationConfig}
    for title, config in sections.items():
        parts.append("\n".join([f"## {title}", "", *rows(config)]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
