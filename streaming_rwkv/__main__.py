"""The program `streaming-rwkv`: all commands under one name; `python -m streaming_rwkv` is the same.

Nothing but the standard library is imported before the command is known, and torch only by commands that need it, after
they have checked their arguments and paths.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from streaming_rwkv.arguments import CommandParser, add_version, did_you_mean
from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing
from streaming_rwkv.processes import end_with
from streaming_rwkv.version import PROGRAM

DATA_COMMANDS = {
    "train-tokenizer": "train a byte-level BPE on the sources of a recipe",
    "prepare": "build a data set from a recipe, or resume an unfinished build",
    "show": "print the tables of a finished data set",
    "inspect": "show documents as the model sees them",
    "verify": "check every shard against the manifest",
    "report": "write a page of plots and samples",
    "upload": "copy a finished data set to object storage",
    "convert": "convert a folder of JSON files to parquet files",
}
RUN_COMMANDS = {
    "train": "train a model on a data set, or resume an unfinished run",
    "generate": "continue a text with a trained model",
    "evaluate": "measure a checkpoint's loss on a data set, or its scores on tasks",
    "export": "write a checkpoint for other programs",
    "average": "average the weights of a run's newest checkpoints",
    "plot": "draw the curves of one or more runs",
}
COMMANDS = DATA_COMMANDS | RUN_COMMANDS


def run() -> NoReturn:
    """Run the command of the command line, and end this process with its status."""
    if sys.argv[1:2] == ["train"]:
        end_with(main)
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without a command print the help."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = command_parser()
    if not arguments:
        parser.print_help()
        return 0
    if arguments[0].startswith("-"):
        parser.parse_args(arguments)  # --help, --version, or an error
    command, *rest = arguments
    if command in DATA_COMMANDS:
        exit_if_missing(*BASE)
        from prep.__main__ import main as prepare

        return prepare([command, *rest], program=PROGRAM)
    if command not in RUN_COMMANDS:
        near = did_you_mean("prepare" if command == "build" else command, list(COMMANDS))
        parser.error(f"{command!r} is no command{near}")
    return _run_command(command, rest)


def command_parser() -> CommandParser:
    """Return the parser of what comes before the command, with the list of all commands as its help."""
    width = max(map(len, COMMANDS))
    groups = [
        "\n  ".join([title, *(f"{name:{width}}  {text}" for name, text in commands.items())])
        for title, commands in (("data sets:", DATA_COMMANDS), ("runs:", RUN_COMMANDS))
    ]
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND …",
        description="\n\n".join(["Pre-train RWKV-7 language models from raw text.", *groups]),
        examples=[
            "{prog} prepare mine.yaml",
            "{prog} train yamls/tiny_cpu.yaml data.path=mine/shards save_folder=runs/mine",
            '{prog} generate runs/mine "def "',
            "{prog} COMMAND --help",
        ],
    )
    add_version(parser)
    return parser


def _run_command(command: str, arguments: list[str]) -> int:
    program = f"{PROGRAM} {command}"
    exit_if_missing(*BASE, extra="train")
    if not {"-h", "--help"} & set(arguments):
        exit_if_missing(*(["matplotlib"] if command == "plot" else TRAIN), extra="train")
    match command:
        case "train":
            from streaming_rwkv.train.__main__ import main as train

            return train(arguments, program=program)
        case "generate":
            from streaming_rwkv.inference.command_line import generate

            return generate(arguments, program=program)
        case "evaluate":
            from streaming_rwkv.inference.command_line import evaluate

            return evaluate(arguments, program=program)
        case "export":
            from streaming_rwkv.inference.command_line import export

            return export(arguments, program=program)
        case "average":
            from streaming_rwkv.inference.command_line import average

            return average(arguments, program=program)
        case "plot":
            from streaming_rwkv.plot import main as plot

            return plot(arguments, program=program)
    raise AssertionError(command)


if __name__ == "__main__":
    run()
