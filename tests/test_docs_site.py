"""The documentation's site: links of pages lead to pages, or to copies of source files; nothing is fetched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs", reason="of the extra `docs`, which the environment of `make test-next` lacks")


@pytest.mark.parametrize(
    ("page", "link", "target", "on_site"),
    [
        ("index.md", "docs/mixtures.md", "docs/mixtures.md", "mixtures.md"),
        ("index.md", "kernels/README.md", "kernels/README.md", "kernels.md"),
        ("mixtures.md", "settings.md", "docs/settings.md", "settings.md"),
        ("mixtures.md", "../streaming_rwkv/data", "streaming_rwkv/data", "source/streaming_rwkv/data/__init__.py"),
        ("contract.md", "../prep/config.py", "prep/config.py", "source/prep/config.py"),
        ("kernels.md", "../README.md", "README.md", "index.md"),
    ],
)
def test_a_link_of_the_repository_is_one_of_the_site(page: str, link: str, target: str, on_site: str) -> None:
    from tools.docs_site import site_path, target_of

    assert target_of(link, page=page) == target
    assert site_path(target) == on_site


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "api.html", "prep_settings.html", "kernels.html", "changelog.html"} <= set(pages)
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="([^"]*)"', text)
        assert [address for address in loaded if "//" in address] == [], name
    assert "load_tokenizer" in pages["api.html"]
