"""Text on a terminal: colors, a pager; control characters are shown, and no encoding of the output ends a program."""

from __future__ import annotations

import errno
import io
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO, cast

from streaming_rwkv.errors import UserError, without_hidden
from streaming_rwkv.limits import explain_limit

if TYPE_CHECKING:
    from rich.table import Table

LOG_COLUMNS = 160
LONGEST_LINE = 2000  # characters of an error
_STYLES = {"error": "1;31", "heading": "36", "quiet": "2"}

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_C1 = {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
# Embeddings, overrides and isolates reorder the text beside them; the marks of ordinary Arabic and Hebrew do not.
_BIDIRECTIONAL = {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_LINE = _PICTURES | _C1 | _BIDIRECTIONAL | {0x2028: "\\u2028", 0x2029: "\\u2029"}
_LINES = {code: shown for code, shown in _LINE.items() if code not in (ord("\n"), ord("\t"))}


def shown(text: str, *, lines: bool = False) -> str:
    r"""Replace control characters: ESC by ␛, C1 and bidirectional controls by \x9b, \u202e.

    A text from elsewhere could otherwise clear the screen, rename the window, or type for the user.

    Args:
        lines: keep line breaks and tabs.
    """
    return text.translate(_LINES if lines else _LINE)


def shown_bytes(count: float) -> str:
    """Return a number of bytes with a unit of 1,000: 850 bytes, 4.1 MB, 1.25 TB."""
    for limit, unit, digits in ((1e12, "TB", 2), (1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if count >= limit:
            return f"{count / limit:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def shown_duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, with days if there are any: 0:07:32, 2d 3:00:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hours}:{minutes:02}:{rest:02}"


class OutputError(UserError):
    """Standard output that cannot be written: its disk is full, or its reader, such as `head`, has closed the pipe."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: cannot be written ({error.strerror}); write it to another place")
        self.is_unread = isinstance(error, BrokenPipeError)


def leave_closed_terminals() -> bool:
    """Have what this process writes to a terminal that was closed go nowhere; return True if there was one."""
    closed = []
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:  # of a file or a pipe, ENOTTY
            if error.args[0] == errno.EIO:
                closed.append(descriptor)
    if closed:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in closed:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
    return bool(closed)


class _Output:
    """A stream whose errors name standard output: those of the system name no file, as those of a full disk do not.

    A terminal that was closed is no error: the program continues until SIGHUP ends it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            if leave_closed_terminals():
                return len(text)
            raise OutputError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            if leave_closed_terminals():
                return
            raise OutputError(error) from error


def prepare_output() -> None:
    """Have standard output and error write what their encoding lacks as an escape, for a front end's `main`.

    One that is closed (`>&-`) writes nothing. Writes to standard output raise `OutputError`. Pictures are drawn into
    files, whatever matplotlib's MPLBACKEND is: a notebook names one that other environments lack. Panics of Rust
    libraries, which become errors of ours, print no stack of calls unless RUST_BACKTRACE is "full".
    """
    os.environ["MPLBACKEND"] = "Agg"
    if os.environ.get("RUST_BACKTRACE") != "full":
        os.environ["RUST_BACKTRACE"] = "0"
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the process's life
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, _Output):
        sys.stdout = cast(TextIO, _Output(sys.stdout))


def styled(text: str, style: Literal["error", "heading", "quiet"], *, stream: TextIO) -> str:
    """Return a text in its style if `stream` is a terminal and the user has not set NO_COLOR (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def print_error(error: Exception) -> None:
    """Write an error to standard error, as all front ends do."""
    begin = styled("error:", "error", stream=sys.stderr)
    lines = [_without_middle(line) for line in without_hidden(str(error)).split("\n")]
    text = shown("\n".join(lines), lines=True)
    print(f"{begin} {text}", file=sys.stderr, flush=True)


def _without_middle(line: str) -> str:
    """Cut a line that repeats a long value of a file, so that its end, which has the remedy, is seen."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"


@contextmanager
def paged() -> Iterator[IO[str]]:
    """Yield a stream for a long text: that of $PAGER, or of `less`, on a terminal, and otherwise standard output."""
    try:
        command = shlex.split(os.environ.get("PAGER", "")) or ["less"]
    except ValueError:  # a quote that is not closed
        command = ["less"]
    if not sys.stdout.isatty() or shutil.which(command[0]) is None:
        yield sys.stdout
        return
    # less ends by itself after a text of one screen (F), keeps colors (R) and leaves the text on the terminal (X).
    environment = {"LESS": "FRX"} | os.environ
    pager = subprocess.Popen(
        command, stdin=subprocess.PIPE, encoding=sys.stdout.encoding, errors="backslashreplace", env=environment
    )
    assert pager.stdin is not None
    try:
        with suppress(BrokenPipeError):  # the user has left the pager
            yield pager.stdin
    finally:
        with suppress(BrokenPipeError):
            pager.stdin.close()
        while pager.poll() is None:
            with suppress(KeyboardInterrupt):  # it is for the pager
                pager.wait()


def run_command(run: Callable[[], int], *, interrupted: str = "") -> int:
    """Run a command and return its exit status; an error that the user can fix is printed as one line.

    Args:
        interrupted: the line after Ctrl-C.
    """

    def run_here() -> int:
        check_current_folder()
        return run()

    return end_in_one_line(run_here, interrupted=interrupted)


def end_in_one_line(run: Callable[[], int], *, interrupted: str = "") -> int:
    """Do as `run_command`, also where the current folder is gone."""
    prepare_output()
    try:
        status = run()
        sys.stdout.flush()  # not left to the end of the process, where an error has no line
        return status
    except OutputError as error:
        _drop_output()
        if error.is_unread:
            return 128 + signal.SIGPIPE
        print_error(error)
        return 1
    except UserError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except BaseException as error:  # a panic of a Rust library is no Exception
        reason = explain_limit(error) or (_explain_file_error(error) if isinstance(error, OSError) else None)
        if reason is None:  # neither about a limit nor about a file, so a fault of this program
            raise
        print_error(UserError(reason))
        return 1


def check_current_folder() -> None:
    """Check that the current folder exists, which relative paths need.

    Raises:
        UserError: it was removed or cannot be reached.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder cannot be used ({error.strerror}): it was removed or moved; change to one that exists "
            "(cd)"
        ) from None


def _explain_file_error(error: OSError) -> str | None:
    """Describe a file that cannot be used, and the remedy; None for another error."""
    if error.strerror is None or error.filename is None:
        return None
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{error.filename}: cannot be read or written ({error.strerror}){remedy and '; '}{remedy}"


_REMEDIES = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "make space on its disk",
    errno.EDQUOT: "make space within your quota",
}


def _drop_output() -> None:
    """Discard what standard output still holds: Python's last flush would fail again, and report that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _LogFormatter(logging.Formatter):
    """Formats a record with its control characters shown: names in it may come from elsewhere."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True)


def log_to_terminal(level: int) -> None:
    """Write log records of at least this level to standard error, for a front end's `main`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("botocore").setLevel(max(level, logging.WARNING))  # it would tell where it found credentials


def print_rich(content: Table | str) -> None:
    """Write a table or a line to standard output."""
    from rich.console import Console  # only the commands that print tables need it

    # A log file has no width, and rich would assume 80 columns, which cut every name of a wide mixture.
    width = None if sys.stdout.isatty() else LOG_COLUMNS
    Console(highlight=False, width=width, soft_wrap=isinstance(content, str)).print(content, markup=False)
