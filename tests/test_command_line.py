"""The program `streaming-rwkv`: help, versions, suggestions, and what it says before torch is imported."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.__main__ import main as prep
from streaming_rwkv.__main__ import COMMANDS, main
from streaming_rwkv.version import __version__
from tests.program_parsers import parse

ROOT = Path(__file__).parents[1]
AS_RANK_1 = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}  # fmt: skip


def exit_status(program: Callable[[list[str]], int], *arguments: str) -> int:
    try:
        return program(list(arguments))
    except SystemExit as ending:
        return int(ending.code or 0)


@pytest.mark.parametrize("program", [main, prep])
def test_without_arguments_the_help_is_printed(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert program([]) == 0
    shown = capsys.readouterr()
    assert "COMMAND --help" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("program", [main, prep])
def test_the_version(program: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(program, "--version") == 0
    assert capsys.readouterr().out == f"streaming-rwkv {__version__}\n"


def test_the_help_and_the_page_name_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    main([])
    shown = capsys.readouterr().out
    for command, text in COMMANDS.items():
        assert f"  {command} " in shown
        assert text in shown
        assert f"| `{command} " in page


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_of_a_command_has_examples_that_it_accepts(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert exit_status(main, command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: streaming-rwkv {command} ")
    examples = shown.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        parse(shlex.split(example))


def test_the_help_shows_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    exit_status(main, "generate", "--help")
    shown = capsys.readouterr().out
    assert "largest number of tokens to generate (default: 256)" in shown
    assert "(default: None)" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trein x.yaml", "'trein' is no command; did you mean 'train'?"),
        ("build x.yaml", "'build' is no command; did you mean 'prepare'?"),
        ("frobnicate", "'frobnicate' is no command\n"),
        ("prepare x.yaml --dryrun", "unrecognized arguments: --dryrun; did you mean '--dry-run'?"),
        ("generate runs/x y --max-tokens=3 --tempratur 1", "did you mean '--temperature'?"),
        ("evaluate runs/x y --to z", "unrecognized arguments: --to z"),  # no --tokenizer
        ("export runs/x out --dtype float23", "; did you mean 'float32'?"),
        ("train x.yaml --data.path=d", "settings are written without dashes: data.path=d"),
        ("train x.yaml processes=none", "--processes: found none, expected 1 or more"),
        (f"train x.yaml processes={'9' * 5000}", "expected 1 or more, at most 999,999"),
        ("train", "the following arguments are required: CONFIG\n"),
    ],
)
def test_wrong_arguments_are_told_with_what_was_meant(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(main, *arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_prep_suggests_the_nearest_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(prep, "reportt", "out") == 2
    assert "did you mean 'report'?" in capsys.readouterr().err


PATHS = [
    (["train", "yamls/tiny_cpu.yaml", "data.path=nowhere"], 1, "nowhere/manifest.json: missing, so this is not a "),
    (["train", "nowhere.yaml"], 1, "nowhere.yaml: no such file"),
    (["generate", "nowhere", "text"], 1, "nowhere: no such file or folder; give a run's save folder"),
    (["evaluate", "nowhere", "data"], 1, "nowhere: no such file or folder; give a run's save folder"),
    (["evaluate", "yamls", "nowhere"], 1, "nowhere/manifest.json: missing, so this is not a finished data set"),
    (["export", "nowhere", "model.pth"], 1, "nowhere: no such file or folder; give a run's save folder"),
    (["export", "yamls", "s3://bucket/model.pth"], 1, "found 's3://bucket/model.pth', expected a local path"),
    (["generate", "--max-tokens", "x", "y"], 2, "invalid int value: 'x'"),
]
PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr
from streaming_rwkv.__main__ import main

found = []
for arguments in json.loads(sys.argv[1]):
    with redirect_stderr(io.StringIO()) as said:
        try:
            status = main(arguments)
        except SystemExit as ending:
            status = ending.code
    slow = [name for name in ("torch", "composer", "streaming") if name in sys.modules]
    found.append((status, said.getvalue(), slow))
print(json.dumps(found))
"""


def test_wrong_paths_are_told_before_torch_is_imported() -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps([arguments for arguments, _, _ in PATHS])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for (arguments, status, message), (actual, said, modules) in zip(PATHS, found, strict=True):
        assert actual == status, arguments
        assert message in said, arguments
        assert modules == [], arguments


def test_initial_weights_that_are_missing_are_told_with_their_setting(
    write_data_set: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data_set(tmp_path / "data", {("web", 1, 32): 4})
    arguments = ["yamls/tiny_cpu.yaml", f"data.path={data}", f"save_folder={tmp_path}/run", "model.init_from=nowhere"]
    assert main(["train", str(ROOT / arguments[0]), *arguments[1:]]) == 1
    assert "error: model.init_from: nowhere: no such file or folder" in capsys.readouterr().err


def test_each_rank_reports_an_environment_that_is_not_a_launchers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another than local rank 0 would wait for a launcher that is not there."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "no.yaml"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: LOCAL_RANK=1 in the environment, without RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["no.yaml"], ["no.yaml", "--processes", "x"]])
def test_a_rank_that_no_launcher_ends_reports_its_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in AS_RANK_1.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("streaming_rwkv.train.__main__.wait_for_launcher", lambda: None)
    monkeypatch.setattr("streaming_rwkv.train.__main__.die_with_parent", lambda: None)  # of this process, too
    assert exit_status(main, "train", *arguments) != 0
    assert "error: " in capsys.readouterr().err


def test_a_launchers_variables_that_are_empty_are_as_unset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in AS_RANK_1:
        monkeypatch.setenv(name, "")
    assert main(["train", "no.yaml"]) == 1
    assert "error: no.yaml: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "no.yaml"], ["plot", "nowhere"], ["show", "nowhere"]])
def test_matplotlib_draws_into_files_whatever_a_notebook_has_set(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert main(command) == 1
    assert os.environ["MPLBACKEND"] == "Agg"
