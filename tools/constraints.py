"""Write requirements/constraints.txt, the tested set of versions, from the environment that runs this script.

    make clean && make CONSTRAINTS=/dev/null test-all     # the newest versions that pyproject.toml admits
    make constraints                                      # once the tests have passed

The file names versions alone: no index, no hashes. A line for which the release needs a newer Python than the oldest
supported one has a marker, and that Python resolves the package by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

FILE = Path(__file__).parents[1] / "requirements" / "constraints.txt"
LEFT_OUT = {"streaming-rwkv", "pip", "setuptools", "wheel"}
PYTHONS = ("3.10", "3.11", "3.12")
HEAD = """\
# The set of versions with which the tests have passed; `make` installs with `--constraint` and this file. Written by
# `make constraints`: see CONTRIBUTING.md.
"""


def line(name: str, version: str, requires_python: str | None) -> str:
    """Return a line of the file, with a marker if the release does not support every Python of the project."""
    admitted = SpecifierSet(requires_python or "")
    oldest = next(python for python in PYTHONS if admitted.contains(f"{python}.99"))
    marker = "" if oldest == PYTHONS[0] else f' ; python_version >= "{oldest}"'
    return f"{canonicalize_name(name)}=={version.partition('+')[0]}{marker}"


def lines(installed: Iterable[Distribution]) -> list[str]:
    """Return the lines for these packages, sorted by name."""
    found = {canonicalize_name(each.metadata["Name"]): each for each in installed}
    return [
        line(name, each.version, each.metadata.get("Requires-Python"))
        for name, each in sorted(found.items())
        if name not in LEFT_OUT
    ]


if __name__ == "__main__":
    FILE.write_text(HEAD + "".join(f"{each}\n" for each in lines(distributions())), encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
