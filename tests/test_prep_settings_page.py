"""docs/prep_settings.md: all settings of a recipe, as the configuration classes declare them."""

from __future__ import annotations

from tools.prep_settings_page import PAGE, page


def test_the_page_is_what_the_classes_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tools.prep_settings_page`"
