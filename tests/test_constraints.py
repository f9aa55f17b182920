"""requirements/constraints.txt: versions alone, which are among those that pyproject.toml admits."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.constraints import FILE, line

LINES = [text for text in FILE.read_text(encoding="utf-8").splitlines() if text and not text.startswith("#")]
PINNED = {canonicalize_name(each.name): each for each in map(Requirement, LINES)}
EXTRAS = ("", "train", "cuda", "s3", "ray", "docs", "dev")


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        (("NumPy", "2.1.3", ">=3.10"), "numpy==2.1.3"),
        (("networkx", "3.6.1", ">=3.11,!=3.14.1"), 'networkx==3.6.1 ; python_version >= "3.11"'),
        (("torch", "2.7.0+cu126", None), "torch==2.7.0"),
    ],
)
def test_a_line(release: tuple[str, str, str | None], expected: str) -> None:
    assert line(*release) == expected


def test_the_file_has_versions_and_no_addresses_or_hashes() -> None:
    for text in LINES:
        assert re.fullmatch(r'[a-z0-9-]+==[\w.!]+( ; python_version >= "3\.\d+")?', text), text


def test_every_requirement_of_this_project_has_a_version_that_it_admits() -> None:
    requirements = [Requirement(text) for text in importlib.metadata.requires("streaming-rwkv") or []]
    wanted = [
        each
        for each in requirements
        if each.name != "streaming-rwkv"
        and (not each.marker or any(each.marker.evaluate({"extra": e}) for e in EXTRAS))
    ]
    assert len(wanted) > 30
    for each in wanted:
        pinned = PINNED[canonicalize_name(each.name)]
        (version,) = (specifier.version for specifier in pinned.specifier)
        assert each.specifier.contains(version, prereleases=True), each
