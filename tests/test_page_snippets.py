"""Snippets of the pages: commands are ones that the programs accept, Python compiles, and what is marked to run runs.

A Python snippet below the line `<!-- run -->` is run in an empty folder.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.program_parsers import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels/README.md", ROOT / "bench/README.md"])
FENCE = re.compile(r"^(<!-- run -->\n+)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = ("streaming-rwkv", "composer", "python -m prep", "python -m streaming_rwkv", "python train.py")
OTHERS = ("python -m pytest", "python -m bench.", "python bench/", "python -m tools.")
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def fences(language: str) -> list[tuple[str, str, bool]]:
    """Return the page, the text and the mark of each fenced block in one language."""
    return [
        (str(page.relative_to(ROOT)), text, bool(mark))
        for page in PAGES
        for mark, name, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if name == language
    ]


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a shell block that is a program of this project or a target of make.

    Lines that end with a backslash continue; what precedes or follows the command (`VAR=…`, `srun`, `&&`, `|`, `;`) is
    left out.
    """
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|\||;", re.sub(r"(^|\s)#.*", "", line)):
            start = re.search(rf"(?:^|[\s'])({'|'.join(map(re.escape, (*OURS, 'make ')))})", part)
            if start and not any(other in part for other in OTHERS):
                command = part[start.start(1) :].replace("…", "").strip()
                if command.count("'") % 2:  # within a quoted command, whose end it has
                    command = command.removesuffix("'")
                found.append(shlex.split(command))
    return found


COMMANDS = [(page, words) for page, text, _ in fences("bash") for words in commands(text)]
PYTHON = fences("python")


def test_a_block_is_divided_into_commands() -> None:
    text = """\
export A=1
RAY_ADDRESS=h:1 python -m prep build a.yaml out=b  # the rest
composer -n 2 train.py x.yaml \\
    data.path=d && make test
srun bash -c 'RANK=$R python train.py y.yaml save_folder=r'
python -m pytest tests
"""
    assert commands(text) == [
        ["python", "-m", "prep", "build", "a.yaml", "out=b"],
        ["composer", "-n", "2", "train.py", "x.yaml", "data.path=d"],
        ["make", "test"],
        ["python", "train.py", "y.yaml", "save_folder=r"],
    ]


def test_pages_have_commands() -> None:
    assert len(COMMANDS) > 40
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/preparation.md", "docs/mixtures.md"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: " ".join(value)[:60])
def test_programs_accept_the_commands_of_pages(page: str, words: list[str]) -> None:
    if words[0] == "make":
        assert set(words[1:]) <= set(TARGETS), page
    else:
        parse(words)


@pytest.mark.parametrize(("page", "text", "is_run"), PYTHON, ids=lambda value: str(value).partition("\n")[0][:40])
def test_python_of_pages_compiles_and_runs(
    page: str, text: str, is_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile(text, page, "exec")
    if is_run:
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "__main__"})


def test_some_python_is_run() -> None:
    assert any(is_run for _, _, is_run in PYTHON)
