"""The command line: `python -m prep build|show|upload|inspect|verify|report|convert|train-tokenizer`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TypeAlias

from streaming_rwkv.arguments import CommandParser, add_version, at_least, parse_with_overrides
from streaming_rwkv.extras import BASE, exit_if_missing
from streaming_rwkv.processes import usable_cores

_Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"
PROGRAM = "python -m prep"
_RECIPE = "yamls/prep/NAME.yaml; docs/prep_settings.md lists its keys"
_DATA_SET = "the data set: a folder, or s3://bucket/path"


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Run one command; return 0 on success, or 1 after printing an error that the user can fix.

    Args:
        arguments: by default those of the command line; without any the help is printed.
        program: `streaming-rwkv` if these are commands of that program, which calls `build` `prepare`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    exit_if_missing(*BASE)
    parser = command_parser(program)
    if not arguments:
        parser.print_help()
        return 0
    options = parse_with_overrides(parser, arguments)
    from streaming_rwkv.console import log_to_terminal, run_command

    log_to_terminal(logging.INFO)
    return run_command(lambda: _run(options), interrupted="interrupted; run the same command again to resume")


def _byte_count(text: str) -> int:
    from streaming_rwkv.quantities import read_bytes

    try:
        count: int = read_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected at least 1")
    return count


def _local_folder(text: str) -> str:
    from streaming_rwkv.location import LocationError, checked_local

    try:
        return checked_local(text)
    except LocationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _location(text: str) -> str:
    from streaming_rwkv.location import LocationError, checked_location

    try:
        return checked_location(text)
    except LocationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command_parser(program: str = PROGRAM) -> CommandParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog=program,
        description="Turn corpora into packed, length-bucketed MDS shards.",
        examples=[
            "{prog} build yamls/prep/stage2.yaml out=/data/stage2 --dry-run",
            "{prog} inspect /data/stage2 --source python-edu",
            "{prog} COMMAND --help",
        ],
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands, "build" if program == PROGRAM else "prepare")
    _add_commands_on_data_sets(commands)
    _add_convert(commands)
    _add_train_tokenizer(commands)
    return parser


def _add_build(commands: _Commands, name: str) -> None:
    build = commands.add_parser(
        name,
        help="build a data set, or resume an unfinished build",
        description="Build the data set that a recipe describes. The same command resumes an unfinished build.",
        examples=[
            "{prog} yamls/prep/stage2.yaml --dry-run",
            "{prog} yamls/prep/stage2.yaml out=/data/stage2 workers=16",
            "{prog} yamls/prep/stage2.yaml out=s3://bucket/stage2 tokenizer=rwkv-world",
        ],
    )
    build.add_argument("config", metavar="RECIPE", help=_RECIPE)
    build.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. out=/data/set workers=8")
    _add_grouping(build)
    build.add_argument("--dry-run", action="store_true", help="count documents and tokens, write nothing")
    build.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although files or settings of sources have changed since the build began",
    )


def _add_grouping(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--by", choices=["source", "bucket"], default="source", help="the rows of the table (default: source)"
    )


def _add_commands_on_data_sets(commands: _Commands) -> None:
    show = commands.add_parser(
        "show",
        help="print the tables of a finished data set",
        description="Print the tables of a finished data set, as its build printed them.",
        examples=["{prog} /data/stage2", "{prog} s3://bucket/stage2 --by bucket"],
    )
    show.add_argument("out", type=_location, help=_DATA_SET)
    _add_grouping(show)

    upload = commands.add_parser(
        "upload",
        help="copy a finished data set to object storage, or resume an unfinished copy",
        description="Copy a finished data set to object storage. The same command resumes an unfinished copy.",
        examples=["{prog} /data/stage2 s3://bucket/stage2"],
    )
    upload.add_argument("folder", type=_local_folder, help="the data set")
    upload.add_argument("to", type=_location, help="s3://bucket/path")

    _add_inspect(commands)

    verify = commands.add_parser(
        "verify",
        help="check every shard against the manifest",
        description="Read every byte of a data set, and check hashes, packs and counts against the manifest.",
        examples=["{prog} /data/stage2", "{prog} s3://bucket/stage2"],
    )
    verify.add_argument("out", type=_location, help=_DATA_SET)

    report = commands.add_parser(
        "report",
        help="write a page of plots and samples, and its numbers as JSON",
        description="Write report.html, a page of plots and samples, and its numbers as report.json.",
        examples=["{prog} /data/stage2", "{prog} s3://bucket/stage2 --to reports/stage2"],
    )
    report.add_argument("out", type=_location, help=_DATA_SET)
    report.add_argument(
        "--to", type=_local_folder, help="the folder to write to; by default the data set's own, if it is local"
    )


def _add_inspect(commands: _Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show documents as the model sees them",
        description="Show documents of a data set as the model sees them.",
        examples=[
            "{prog} /data/stage2 --count 3",
            "{prog} /data/stage2 --source python-edu --bucket 257-512 --seed 1",
            "{prog} /data/stage2 --grep 'import torch' --ids",
            "{prog} /data/stage2 --in-order --skip 100",
            "{prog} s3://bucket/stage2 --split validation",
        ],
    )
    inspect.add_argument("out", type=_location, help=_DATA_SET)
    inspect.add_argument("--split", default="train", choices=["train", "validation"], help="the split to show")
    inspect.add_argument("--source", help="show only this source")
    inspect.add_argument("--bucket", help="show only this bucket, e.g. 1-256")
    inspect.add_argument("--seed", type=at_least(0), default=0, help="choose other documents at random (default: 0)")
    inspect.add_argument("--in-order", action="store_true", help="show documents as they are stored, not at random")
    inspect.add_argument("--grep", metavar="TEXT", help="search all documents for a text, in upper or lower case")
    inspect.add_argument("--ids", action="store_true", help="show the token ids, too")
    inspect.add_argument(
        "--skip", type=at_least(0), default=0, help="the number of pieces to skip (default: 0); in the stored order"
    )
    inspect.add_argument("--count", type=at_least(0), default=10, help="the number of pieces to show (default: 10)")


def _add_convert(commands: _Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert a folder of JSON files to parquet files with a text column",
        description="Convert a folder of JSON files to parquet files with a text column. Optional: JSON is read, too.",
        examples=["{prog} corpus/json corpus/parquet", "{prog} corpus/json corpus/parquet --text body --workers 8"],
    )
    convert.add_argument(
        "folder", type=_location, help="searched at any depth for JSON files, including compressed ones"
    )
    convert.add_argument("to", type=_local_folder, help="the folder to write to")
    convert.add_argument("--text", default="text", help="the key that holds the text")
    convert.add_argument(
        "--workers",
        type=at_least(1, most=1024),
        default=usable_cores(),
        help="the number of processes; by default one per core",
    )


def _add_train_tokenizer(commands: _Commands) -> None:
    train = commands.add_parser(
        "train-tokenizer",
        help="train a byte-level BPE on the sources of a configuration",
        description="Train a byte-level BPE tokenizer on the sources of a recipe.",
        examples=["{prog} mine.yaml --vocab-size 4096 --to mine/tokenizer"],
    )
    train.add_argument("config", metavar="RECIPE", help=_RECIPE)
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. sources.web.text=body")
    train.add_argument("--vocab-size", type=int, required=True, help="the number of tokens, at least 257")
    train.add_argument("--to", type=_local_folder, required=True, help="the folder to write to: a new or empty one")
    train.add_argument(
        "--most-bytes",
        type=_byte_count,
        default="256mb",
        help="largest amount of text to train on, spread evenly over the sources: bytes, or with kb, mb or gb",
    )


def _run(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` and the start of a worker do not wait for what one command needs.
    match options.command:
        case "build" | "prepare":
            from prep.commands.build import run
        case "show":
            from prep.commands.show import run
        case "upload":
            from prep.commands.upload import run
        case "inspect":
            from prep.commands.inspection import run
        case "verify":
            from prep.commands.verify import run
        case "report":
            from prep.commands.report import run
        case "convert":
            from prep.commands.convert import run
        case "train-tokenizer":
            from prep.commands.train_tokenizer import run
        case _:
            raise AssertionError(options.command)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
