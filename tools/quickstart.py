"""Run the quickstarts of README and docs in a clean clone, as a reader would, and stop at the first error.

    python -m tools.quickstart                        # `make` builds the environment there: some minutes, 7 GB
    python -m tools.quickstart --environment .venv    # the packages of an environment that is there already
    python -m tools.quickstart --quick …              # without the demo, and with a tenth of the corpus

The clone has the newest commit. The YAML blocks of a part are written to the files that the text names, its `bash`
blocks are run in one shell, and the corpus that it asks for is 60 files of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PARTS = [("README.md", "Quickstart"), ("docs/preparation.md", "A corpus of your own")]
CORPUS = "mine/texts.jsonl"
CORPUS_FILES = 60
ACTIVATE = ". .venv/bin/activate"
DEMO = "make demo"


def part_of(page: str, heading: str) -> str:
    """Return the text below a heading, up to the next one of its level or above."""
    text = re.sub(r"```.*?```", lambda block: "`" * len(block[0]), page, flags=re.DOTALL)  # a remark is no heading
    found = re.search(rf"^(#+) {re.escape(heading)}\n", text, re.MULTILINE)
    assert found is not None, heading
    end = re.compile(rf"^#{{1,{len(found[1])}}} ", re.MULTILINE).search(text, found.end())
    return page[found.end() : end.start() if end else None]


def files_of(part: str) -> dict[str, str]:
    """Return the YAML blocks by the name that the text before them gives: the last one in backticks."""
    blocks = re.finditer(r"```yaml\n(.*?)```", part, re.DOTALL)
    return {re.findall(r"`(\S+\.yaml)`", part[: block.start()])[-1]: block[1] for block in blocks}


def commands_of(part: str) -> list[str]:
    """Return the commands of the `bash` blocks; a line that ends with a backslash continues."""
    text = "".join(re.findall(r"```bash\n(.*?)```", part, re.DOTALL))
    return [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line and not line.startswith("#")]


def make_environment(clone: Path, environment: Path) -> None:
    """Make `.venv` in the clone, with the project from there and all other packages from `environment`."""
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "venv", "--without-pip", ".venv"], cwd=clone, check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs, ours = (
        subprocess.check_output([path, "-c", where], cwd=clone, text=True).strip()
        for path in (python, ".venv/bin/python")
    )
    Path(ours, "packages.pth").write_text(f"{theirs}\n", encoding="utf-8")
    install = ["-m", "pip", "--python", ".venv", "install", "--quiet", "--no-deps"]
    subprocess.run([python, *install, "--editable", "."], cwd=clone, check=True)
    Path(clone, ".venv", ".installed").touch()


def write_corpus(to: Path, *, files: int) -> None:
    """Write JSON lines with a `text` each, of Python's own modules."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in modules)
    to.parent.mkdir()
    to.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")


def run_part(clone: Path, part: str, *, is_quick: bool) -> None:
    """Run the commands of a part in a clone without files of an earlier part.

    Raises:
        subprocess.CalledProcessError: the first command that fails ends the shell.
    """
    subprocess.run(["git", "clean", "-ffdxq", "--exclude=.venv"], cwd=clone, check=True)
    write_corpus(clone / CORPUS, files=CORPUS_FILES // 10 if is_quick else CORPUS_FILES)
    for name, content in files_of(part).items():
        Path(clone, name).write_text(content, encoding="utf-8")
    commands = [command for command in commands_of(part) if not (is_quick and command.startswith(DEMO))]
    if not any(command.startswith(ACTIVATE) for command in commands):
        commands.insert(0, ACTIVATE)
    script = "\n".join(f"echo; echo {shlex.quote(f'$ {command}')}\n{command}" for command in commands)
    variables = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    subprocess.run(["bash", "-ec", script], cwd=clone, env=variables, stdin=subprocess.DEVNULL, check=True)


def main() -> int:
    """Run all parts and return the exit status."""
    parser = argparse.ArgumentParser(description="Run the quickstarts of README and docs in a clean clone.")
    parser.add_argument("--environment", type=Path, metavar="PATH", help="use the packages of this environment")
    parser.add_argument("--quick", action="store_true", help="leave out the demo and most of the corpus")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="quickstart-") as folder:
        clone = Path(folder, "streaming-rwkv")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        if options.environment is not None:
            make_environment(clone, options.environment.absolute())
        for page, heading in PARTS:
            print(f"\n== {page}: {heading}", flush=True)
            try:
                run_part(clone, part_of((clone / page).read_text(encoding="utf-8"), heading), is_quick=options.quick)
            except subprocess.CalledProcessError as error:
                print(f"{page}: {heading}: a command ended with status {error.returncode}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
