"""The command line: `python -m prep build|show|upload|inspect|verify|report|convert|train-tokenizer`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from streaming_rwkv.extras import BASE, exit_if_missing
from streaming_rwkv.processes import usable_cores

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_DATA_SET = "the data set: a folder, or s3://bucket/path"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0 on success, or 1 after printing an error that the user can fix."""
    exit_if_missing(*BASE)
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from streaming_rwkv.config import UserError
    from streaming_rwkv.console import print_error, tolerate_any_encoding

    tolerate_any_encoding()
    try:
        return _run(options)
    except UserError as error:
        print_error(error)
        return 1
    except OSError as error:
        if error.filename is None or error.strerror is None:  # not about a file, so a fault of this program
            raise
        print(f"error: {error.filename}: cannot be read or written ({error.strerror})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; overrides may follow options (`--dry-run out=x`), which argparse alone does not accept."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, at least {least}")
        return int(text)

    return number


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prep", description="Turn corpora into packed, length-bucketed MDS shards."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    _add_commands_on_data_sets(commands)
    _add_convert(commands)
    _add_train_tokenizer(commands)
    return parser


def _add_build(commands: _Commands) -> None:
    build = commands.add_parser("build", help="build a data set, or resume an unfinished build")
    build.add_argument("config", help="yamls/prep/NAME.yaml")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. out=/data/set workers=8")
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
    show = commands.add_parser("show", help="print the tables of a finished data set")
    show.add_argument("out", type=_location, help=_DATA_SET)
    _add_grouping(show)

    upload = commands.add_parser(
        "upload", help="copy a finished data set to object storage, or resume an unfinished copy"
    )
    upload.add_argument("folder", type=_local_folder, help="the data set")
    upload.add_argument("to", type=_location, help="s3://bucket/path")

    inspect = commands.add_parser("inspect", help="show documents as the model sees them")
    inspect.add_argument("out", type=_location, help=_DATA_SET)
    inspect.add_argument("--split", default="train", choices=["train", "validation"])
    inspect.add_argument("--source", help="show only this source")
    inspect.add_argument("--bucket", help="show only this bucket, e.g. 1-256")
    inspect.add_argument("--seed", type=_at_least(0), default=0, help="choose other documents at random (default: 0)")
    inspect.add_argument("--in-order", action="store_true", help="show documents as they are stored, not at random")
    inspect.add_argument("--grep", metavar="TEXT", help="search all documents for a text, in upper or lower case")
    inspect.add_argument("--ids", action="store_true", help="show the token ids, too")
    inspect.add_argument(
        "--skip", type=_at_least(0), default=0, help="the number of pieces to skip (default: 0); in the stored order"
    )
    inspect.add_argument("--count", type=_at_least(0), default=10, help="the number of pieces to show (default: 10)")

    verify = commands.add_parser("verify", help="check every shard against the manifest")
    verify.add_argument("out", type=_location, help=_DATA_SET)

    report = commands.add_parser("report", help="write a page of plots and samples, and its numbers as JSON")
    report.add_argument("out", type=_location, help=_DATA_SET)
    report.add_argument(
        "--to", type=_local_folder, help="the folder to write to; by default the data set's own, if it is local"
    )


def _add_convert(commands: _Commands) -> None:
    convert = commands.add_parser("convert", help="convert a folder of JSON files to parquet files with a text column")
    convert.add_argument(
        "folder", type=_location, help="searched at any depth for JSON files, including compressed ones"
    )
    convert.add_argument("to", type=_local_folder, help="the folder to write to")
    convert.add_argument("--text", default="text", help="the key that holds the text")
    convert.add_argument(
        "--workers", type=_at_least(1), default=usable_cores(), help="the number of processes; by default one per core"
    )


def _add_train_tokenizer(commands: _Commands) -> None:
    train = commands.add_parser("train-tokenizer", help="train a byte-level BPE on the sources of a configuration")
    train.add_argument("config", help="yamls/prep/NAME.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. sources.web.text=body")
    train.add_argument("--vocab-size", type=int, required=True, help="the number of tokens, at least 257")
    train.add_argument("--to", type=_local_folder, required=True, help="the folder to write to: a new or empty one")
    train.add_argument(
        "--most-bytes",
        type=_at_least(1),
        default=1 << 28,
        help="largest number of bytes of text to train on, spread evenly over the sources",
    )


def _run(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` and the start of a worker do not wait for what one command needs.
    match options.command:
        case "build":
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
