"""Arguments of the commands: help that shows defaults and examples, errors that name the nearest word."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from streaming_rwkv.console import end_in_one_line
from streaming_rwkv.version import PROGRAM, __version__


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; an option's help ends with its default, if that says anything."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shows_default = action.option_strings and isinstance(action.default, (str, int, float)) and action.nargs != 0
        if not shows_default or "default" in text or action.default == argparse.SUPPRESS:
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` with examples, whose errors suggest what was meant.

    Args:
        examples: command lines, in which `{prog}` is the name of the program.
        options: those of `ArgumentParser`.
    """

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        options.setdefault("formatter_class", _HelpFormatter)
        options.setdefault("allow_abbrev", False)  # `--to` is no `--tokenizer`
        super().__init__(**options)
        self.examples = [example.format(prog=self.prog) for example in examples]
        if self.examples:
            self.epilog = "\n  ".join(["examples:", *self.examples])

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, with the nearest word that is known, and exit with status 2."""
        super().error(f"{message}{self._suggestion(message)}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write help, a version or an error; argparse itself would be silent about an output that cannot be written."""

        def write() -> int:
            super(CommandParser, self)._print_message(message, sys.stdout if is_output else file)
            return 0

        is_output = file is sys.stdout  # which `end_in_one_line` replaces
        if status := end_in_one_line(write):
            sys.exit(status)

    def _suggestion(self, message: str) -> str:
        if found := re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message, re.DOTALL):
            return did_you_mean(found[1], re.findall(r"[\w./-]+", found[2]))
        if not (found := re.search(r"unrecognized arguments: (-\S*)", message)):
            return ""
        name, _, value = found[1].partition("=")
        if value and not name.lstrip("-").startswith("-") and "." in name:
            return f"; settings are written without dashes: {name.lstrip('-')}={value}"
        return did_you_mean(name, sorted(self._known_options()))

    def _known_options(self) -> set[str]:
        parsers = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        return {option for parser in parsers for option in parser._option_string_actions}


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option `--version`."""
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version and exit"
    )


def at_least(least: int, *, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Return a `type` of an argument that is a whole number in this range."""

    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,19}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"found {text[:80]!r}, expected a whole number, at least {least} and at most {most:,}"
            )
        return int(text)

    return number


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a question that names the nearest known word, or nothing if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse_with_overrides(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; overrides may follow options (`--dry-run out=x`), which argparse alone does not accept."""
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options
