"""Control characters are shown, and no encoding of the output ends a program."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streaming_rwkv.__main__ import main
from streaming_rwkv.console import (
    OutputError,
    _LogFormatter,
    paged,
    print_error,
    print_rich,
    run_command,
    shown,
    styled,
)
from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import explained_writes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b[31mred", "␛[2J␛[31mred"),
        ("a\x00b\x07\r\x7f", "a␀b␇␍␡"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("床前🎉 مرحبا\u200f", "床前🎉 مرحبا\u200f"),
    ],
)
def test_controls_are_shown_and_all_else_is_kept(text, expected):
    assert shown(text) == shown(text, lines=True) == expected


def test_a_text_keeps_its_lines_and_a_name_has_one():
    assert shown("a\n\tb", lines=True) == "a\n\tb"
    assert shown("a\n\tb") == "a␊␉b"


def run(program: str, *arguments: str | bytes, encoding: str = "ascii") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(
        [sys.executable, "-m", program, *arguments], env=environment, capture_output=True, text=True, timeout=250
    )


def test_inspect_shows_controls_and_writes_in_any_encoding(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "中文 \\u001b[2J"}\n{"txt": 1}\n')
    name = tmp_path / "in" / "b\x1b[2J.jsonl"
    name.write_text('{"txt": 1}\n')
    recipe = f"out: {tmp_path}/out\ntokenizer: rwkv-world\nvalidation: 0\nworkers: 1\n"
    recipe += f"sources:\n  s: {{paths: {tmp_path}/in}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    built = run("prep", "build", str(tmp_path / "recipe.yaml"), encoding="utf-8")
    assert built.returncode == 0, built.stderr
    assert "\x1b" not in built.stdout + built.stderr
    assert "b␛[2J.jsonl: row 0" in built.stdout
    inspected = run("prep", "inspect", str(tmp_path / "out"), encoding="utf-8")
    assert "⟨bos⟩中文 ␛[2J⟨eos⟩" in inspected.stdout
    ascii_only = run("prep", "inspect", str(tmp_path / "out"))
    assert (ascii_only.returncode, ascii_only.stderr) == (0, "")
    assert r"\u27e8bos\u27e9\u4e2d\u6587 \u241b[2J\u27e8eos\u27e9" in ascii_only.stdout
    rebuilt = run("prep", "build", str(tmp_path / "recipe.yaml"), f"out={tmp_path}/again")
    assert rebuilt.returncode == 0, rebuilt.stderr


@pytest.mark.parametrize("program", ["prep", "streaming_rwkv.generate", "streaming_rwkv.export", "streaming_rwkv.plot"])
def test_an_error_about_a_name_with_controls_is_one_plain_line(program, tmp_path):
    name = str(tmp_path / "中\x1b[2J")
    given = {"prep": ["verify", name], "streaming_rwkv.export": [name, str(tmp_path / "out")]}.get(program, [name])
    done = run(program, *given)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert r"\u4e2d\u241b[2J" in done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_shows_controls():
    record = logging.LogRecord("a", logging.WARNING, "", 0, "tokenizer %s:\nno", ("x\x1b[2J",), None)
    assert _LogFormatter("%(message)s").format(record) == "tokenizer x␛[2J:\nno"


def test_a_file_that_cannot_be_used_is_one_line(tmp_path, capsys):
    for name in ("missing", "\x1b[2J", "x" * 300):
        assert run_command(lambda name=name: len((tmp_path / name).read_bytes())) == 1
        assert capsys.readouterr().err.startswith(f"error: {shown(str(tmp_path / name))}: cannot be read or written (")


CANNOT_WRITE = "error: standard output: cannot be written (No space left on device); write it to another place\n"


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@contextmanager
def full_output() -> Iterator[None]:
    """Have standard output on a full disk."""
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        yield


@needs_full
@pytest.mark.parametrize(
    "write",
    [
        lambda: print("text"),
        lambda: print("text", flush=True),
        lambda: print("text" * 100_000),  # more than any buffer keeps for another try
        lambda: print_rich("text"),
        lambda: print_rich("text" * 100_000),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(write, capsys):
    with full_output():
        assert run_command(lambda: write() or 0) == 1
    assert capsys.readouterr().err == CANNOT_WRITE


@needs_full
@pytest.mark.parametrize("arguments", ["", "--help", "--version", "show --help", "train --help", "evaluate --help"])
def test_a_help_that_cannot_be_written_is_no_success(arguments, capsys):
    with full_output(), pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 1
    assert capsys.readouterr().err == CANNOT_WRITE


def test_an_output_that_cannot_be_written_is_not_taken_for_the_disk_of_a_file():
    error = OutputError(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"^standard output: "), explained_writes(Path("model.pth")):
        raise error


@pytest.mark.parametrize("write", [print, print_rich])
def test_a_reader_may_leave_before_the_end(write, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert run_command(lambda: write("text") or 0) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", ["show data", "train run.yaml", "generate runs/a", "plot runs/a"])
def test_a_current_folder_that_was_removed_is_named(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(arguments.split()) == 1
    assert capsys.readouterr().err == (
        "error: the current folder cannot be used (No such file or directory): it was removed or moved; change to one "
        "that exists (cd)\n"
    )


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "; check its permissions"),
        (errno.EROFS, "; choose a place that can be written"),
        (errno.ENAMETOOLONG, "; choose a shorter name"),
        (errno.ENOSPC, "; make space on its disk"),
        (errno.EIO, ""),
    ],
)
def test_an_error_of_a_file_has_a_remedy_where_there_is_one(number, remedy, capsys):
    assert run_command(lambda: (_ for _ in ()).throw(OSError(number, os.strerror(number), "x"))) == 1
    assert capsys.readouterr().err == f"error: x: cannot be read or written ({os.strerror(number)}){remedy}\n"


def test_the_limit_of_open_files_is_named(capsys):
    assert run_command(lambda: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files"))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Too many open files: this process has reached its limit of ")
    assert error.endswith(" open files (ulimit -n); raise that limit\n")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(OSError, match="no file"):
        run_command(lambda: (_ for _ in ()).throw(OSError("no file")))


@pytest.mark.parametrize(
    ("is_terminal", "variables", "expected"),
    [
        (True, {}, "\x1b[36mx\x1b[0m"),
        (True, {"NO_COLOR": ""}, "\x1b[36mx\x1b[0m"),  # as if it were not set
        (True, {"NO_COLOR": "1"}, "x"),
        (True, {"TERM": "dumb"}, "x"),
        (False, {}, "x"),
    ],
)
def test_colors_are_for_terminals_whose_users_want_them(is_terminal, variables, expected, monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    assert styled("x", "heading", stream=stream) == expected


@pytest.mark.parametrize(("pager", "expected"), [("cat -n", "     1\ta\n     2\tb\n"), ("no-such-pager", "a\nb\n")])
def test_a_long_text_is_for_the_pager_of_a_terminal(pager, expected, monkeypatch, capfd):
    monkeypatch.setenv("PAGER", pager)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with paged() as output:
        print("a\nb", file=output)
    assert capfd.readouterr().out == expected


def test_a_pager_may_be_left_before_the_end(monkeypatch):
    monkeypatch.setenv("PAGER", "true")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with paged() as output:
        for _ in range(1 << 16):
            print("a line that nobody reads", file=output)


def test_without_a_terminal_there_is_no_pager():
    with paged() as output:
        assert output is sys.stdout


def test_a_closed_output_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(lambda: print("lost") or 0) == 0
    sys.stdout.close()
    sys.stderr.close()


def test_a_long_value_in_an_error_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(UserError(f"manifest.json: format: found {'x' * 100_000}, expected 2; build it again\nsecond line"))
    found = capsys.readouterr().err
    assert found.startswith("error: manifest.json: format: found xxx")
    assert found.endswith("xxx, expected 2; build it again\nsecond line\n")
    assert len(found) < 2100
