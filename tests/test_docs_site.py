"""The documentation's site: links of pages lead to pages, or to copies of source files; nothing is fetched."""

from __future__ import annotations

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


def test_a_page_that_loads_from_the_network_stops_the_build(tmp_path: Path) -> None:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.exceptions import PluginError

    from tools.docs_site import on_post_build

    config = MkDocsConfig()
    config.site_dir = str(tmp_path)
    page = tmp_path / "index.html"
    page.write_text(
        '<a href="https://a.b/c">c</a> <script src="assets/x.js"></script> <img alt="" src="docs/report.png">'
    )
    on_post_build(config)
    page.write_text(page.read_text() + '<link rel="stylesheet" href="https://fonts.example/roboto.css">')
    with pytest.raises(PluginError, match=r"index\.html: loads https://fonts\.example/roboto\.css; "):
        on_post_build(config)


@pytest.mark.parametrize(("package", "name"), [("streaming_rwkv", "load_tokenizer"), ("prep", "build")])
def test_public_names_are_in_the_reference(package: str, name: str) -> None:
    from tools.docs_site import public_names

    assert f"::: {package}.{name}" in public_names(package).splitlines()
