"""Parse a command of this project as its program would, without running it: for tests of help texts and pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prep.__main__ import PROGRAM as PREP
from prep.__main__ import command_parser as prep_parser
from streaming_rwkv.__main__ import DATA_COMMANDS, RUN_COMMANDS, command_parser
from streaming_rwkv.arguments import parse_with_overrides
from streaming_rwkv.inference.command_line import average_parser, evaluate_parser, export_parser, generate_parser
from streaming_rwkv.plot import command_parser as plot_parser
from streaming_rwkv.train.__main__ import command_parser as train_parser
from streaming_rwkv.version import PROGRAM

LAUNCHER_OPTIONS = {"-n", "--nproc", "--world_size", "--node_rank", "--master_addr", "--master_port"}


def parse(words: Sequence[str]) -> None:
    """Parse a command line of one of this project's programs; any other program is an error.

    Raises:
        SystemExit: the program refuses the arguments.
        AssertionError: there is no such program or command.
    """
    program, *arguments = words
    if program == "composer":
        while arguments[0] in LAUNCHER_OPTIONS:
            arguments = arguments[2:]
        program, *arguments = ["python", *arguments]
    if program in ("python", ".venv/bin/python"):
        module, arguments = (arguments[1], arguments[2:]) if arguments[0] == "-m" else (arguments[0], arguments[1:])
        if module == "prep":
            parse_with_overrides(prep_parser(PREP), arguments)
            return
        command = "train" if Path(module).name == "train.py" else module.removeprefix("streaming_rwkv.")
        assert command in RUN_COMMANDS, words
    else:
        assert Path(program).name == PROGRAM, words
        if arguments[0].startswith("-"):
            command_parser().parse_args(arguments)
            return
        command, *arguments = arguments
    _parse_command(command, arguments)


def _parse_command(command: str, arguments: list[str]) -> None:
    if command in DATA_COMMANDS:
        parse_with_overrides(prep_parser(PROGRAM), [command, *arguments])
        return
    parsers = {
        "train": train_parser,
        "generate": generate_parser,
        "evaluate": evaluate_parser,
        "export": export_parser,
        "average": average_parser,
        "plot": plot_parser,
    }
    if command == "train":
        train_parser(command).parse_intermixed_args(arguments)
    else:
        assert command in parsers, command
        parsers[command](command).parse_intermixed_args(arguments)
