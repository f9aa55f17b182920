"""`tools.quickstart` finds what a reader of the pages would write and run."""

from __future__ import annotations

import pytest
import yaml

from tools.quickstart import ACTIVATE, CORPUS, PARTS, ROOT, commands_of, files_of, part_of

PAGE = """\
# A page

## First

Write `a.jsonl` and a recipe, `a.yaml`:

```yaml
out: x
```

```bash
one --now    # at once
two \\
  three
```

### Within

```bash
# a remark
four
```

## Second

```bash
five
```
"""


def test_a_part_is_divided_into_files_and_commands() -> None:
    part = part_of(PAGE, "First")
    assert files_of(part) == {"a.yaml": "out: x\n"}
    assert commands_of(part) == ["one --now    # at once", "two  three", "four"]
    assert commands_of(part_of(PAGE, "Second")) == ["five"]


@pytest.mark.parametrize(("page", "heading"), PARTS)
def test_the_pages_have_a_recipe_and_commands_for_the_corpus(page: str, heading: str) -> None:
    part = part_of((ROOT / page).read_text(encoding="utf-8"), heading)
    (recipe,) = files_of(part).values()
    assert yaml.safe_load(recipe)["sources"] == {"mine": {"paths": CORPUS}}
    assert len(commands_of(part)) >= 6


def test_the_environment_is_activated_once_in_the_readme() -> None:
    commands = commands_of(part_of((ROOT / "README.md").read_text(encoding="utf-8"), "Quickstart"))
    assert commands[0].split()[:2] == ["make", "demo"]
    assert commands[1].startswith(ACTIVATE)
    assert (ROOT / "README.md").read_text(encoding="utf-8").count(ACTIVATE) == 1
