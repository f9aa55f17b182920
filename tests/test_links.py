"""Pages: their links lead to files and headings that exist, and the README's tree of sources names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("bench/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:prep|streaming_rwkv|kernels|bench|tests|docs|yamls|requirements)/[\w./-]+)`")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_GitHub(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The WKV-7 kernels\n\n```\n# a comment\n```\n\n## Speed, and where\n")
    assert anchors(page) == {"the-wkv-7-kernels", "speed-and-where"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_the_sources_exist(page: Path) -> None:
    for path in CODE_PATH.findall(page.read_text(encoding="utf-8")):
        if path.startswith("bench/results"):  # made by the benchmarks
            continue
        assert (ROOT / path).exists(), path


def test_the_tree_of_the_README_names_what_exists() -> None:
    """An entry is indented by its depth; entries of one line are separated by commas and may leave out `.py`."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Source\n\n```\n")[2].partition("```")[0]
    folders: list[str] = []
    for line in section.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = [name.strip() for name in re.split(r" {2,}", line.strip())[0].split(",")]
        assert depth <= len(folders), line
        folders = [*folders[:depth], names[0].rstrip("/")]
        for name in names:
            path = ROOT.joinpath(*folders[:-1], name)
            assert path.exists() or path.with_suffix(".py").exists(), line
