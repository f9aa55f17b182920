"""Messages, help and pages name commands as `streaming-rwkv COMMAND`; few places say what else starts them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER = re.compile(r"python -m (?:prep|streaming_rwkv)\b|(?:python|composer) train\.py|\bprep (?:build|show|verify)\b")
PROGRAM_NAME = re.compile(r"python -m [\w.]+|composer train\.py")  # of a usage line: as the user has typed it
EXPLAIN_OTHERS = {"README.md", "CHANGELOG.md", "docs/commands.md"}
SOURCES = sorted([*ROOT.glob("prep/**/*.py"), *ROOT.glob("streaming_rwkv/**/*.py"), ROOT / "demo.py"])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("yamls/**/*.yaml")])


def messages(source: str) -> list[str]:
    """Return all texts of a module but its docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_name_the_program(path: Path) -> None:
    found = [text for text in messages(path.read_text(encoding="utf-8")) if OTHER.search(text)]
    assert [text for text in found if not PROGRAM_NAME.fullmatch(text)] == []


def test_pages_name_the_program() -> None:
    others = {str(page.relative_to(ROOT)) for page in PAGES if OTHER.search(page.read_text(encoding="utf-8"))}
    assert others == EXPLAIN_OTHERS
