"""Hooks of MkDocs (mkdocs.yml): pages from outside docs/, and links that work in the repository and on the site.

README.md of the root is the front page. A relative link is resolved in the repository: one to a page leads to that page
of the site, one to a source file leads to a copy of it. MkDocs then reports what leads nowhere.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "kernels.md",
    "bench/README.md": "benchmarks.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
_NAMES = re.compile(r"<!-- names of (\w+) -->")
_BLOCK = re.compile(r"(```.*?```)", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that mkdocs.yml does not name to the end of the navigation, so that none is left out."""
    named = re.findall(r"[\w-]+\.md", str(config.nav))
    others = sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name not in named)
    if others and config.nav is not None:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the source files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = {
        target
        for file in files.documentation_pages()
        for path, _ in _LINK.findall(_BLOCK.sub("", file.content_string))
        for target in [site_path(target_of(path, page=file.src_uri))]
        if target.startswith("source/") and (ROOT / target.removeprefix("source/")).is_file()
    }
    for target in sorted(linked):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target.removeprefix("source/"))))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of a page from the repository's paths to the site's, and list the packages' public names."""
    markdown = _NAMES.sub(lambda match: public_names(match[1]), markdown)
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda match: _rewritten(match, page.file.src_uri), part)
        for part in _BLOCK.split(markdown)
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Check that the site's pages load nothing from the network.

    Raises:
        PluginError: one does.
    """
    for page in sorted(Path(config.site_dir).glob("*.html")):
        if addresses := loaded_from_elsewhere(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name}: loads {addresses[0]}; the site must work without a network")


def loaded_from_elsewhere(html: str) -> list[str]:
    """Return the addresses, with a host, from which a page loads scripts, images, styles or frames."""
    loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="([^"]*)"', html)
    return [address for address in loaded if "//" in address]


def public_names(package: str) -> str:
    """Return a section with the documentation of each name in a package's `__all__`, if it has one."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return "\n".join([f"## `{package}`", "", *(f"::: {package}.{name}" for name in names)])
    return ""


def target_of(path: str, *, page: str) -> str:
    """Return the repository's path of a link on a page of the site."""
    source = SOURCES.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def site_path(target: str) -> str:
    """Return the site's path of a file of the repository."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if (ROOT / target).is_dir():  # a folder has no copy; its first module says what is in it
        target = f"{target}/__init__.py"
    return f"source/{target}"


def _rewritten(match: re.Match[str], page: str) -> str:
    path = posixpath.relpath(site_path(target_of(match[1], page=page)), posixpath.dirname(page) or ".")
    return f"]({path}{match[2] or ''})"
