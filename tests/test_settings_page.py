"""docs/settings.md: what `tools/settings_page.py` generates."""

from __future__ import annotations

from tools.settings_page import PAGE, page


def test_the_page_is_generated_from_the_classes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tools.settings_page`"
