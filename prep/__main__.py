"""The command line: `python -m prep build|upload|inspect|verify|report|convert|train-tokenizer`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from streaming_rwkv.processes import usable_cores

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell shows it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 with the error's text if something outside this program is wrong."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Here, not above: `--help` and the start of a worker should not wait for what one command needs.
    from streaming_rwkv.config import UserError
    from streaming_rwkv.console import print_error, tolerate_any_encoding

    tolerate_any_encoding()
    try:
        return int(options.command(options))
    except UserError as error:
        print_error(error)
        return 1
    except OSError as error:
        if error.filename is None or error.strerror is None:  # not about a file: our own mistake
            raise
        print(f"error: {error.filename}: cannot be read or written ({error.strerror})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes no more positional arguments after an option; here `--dry-run out=x` is as good as the reverse."""
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
        prog="python -m prep", description="Corpora to packed, length-bucketed MDS shards."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build a data set, or go on with one")
    build.add_argument("config", help="yamls/prep/NAME.yaml")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. out=/data/set workers=8")
    build.add_argument("--dry-run", action="store_true", help="count documents and tokens, write nothing")
    build.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with files or settings of sources that changed since an unfinished build began",
    )
    build.set_defaults(command=_build)

    upload = commands.add_parser("upload", help="copy a finished data set to object storage, or go on with that")
    upload.add_argument("folder", type=_local_folder, help="the data set")
    upload.add_argument("to", type=_location, help="s3://bucket/path")
    upload.set_defaults(command=_upload)

    inspect = commands.add_parser("inspect", help="show documents as the model will see them")
    inspect.add_argument("out", type=_location, help="the data set: a folder, or s3://bucket/path")
    inspect.add_argument("--split", default="train", choices=["train", "validation"])
    inspect.add_argument("--source", help="one source")
    inspect.add_argument("--bucket", help="one bucket, e.g. 1-256")
    inspect.add_argument("--skip", type=_at_least(0), default=0, help="pieces to pass over")
    inspect.add_argument("--count", type=_at_least(0), default=10, help="pieces to show")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="check every shard against the manifest")
    verify.add_argument("out", type=_location, help="the data set: a folder, or s3://bucket/path")
    verify.set_defaults(command=_verify)

    report = commands.add_parser("report", help="write a page of plots and samples, and its figures as JSON")
    report.add_argument("out", type=_location, help="the data set: a folder, or s3://bucket/path")
    report.add_argument(
        "--to", type=_local_folder, help="the folder to write into; the data set's own if not given and it is one"
    )
    report.set_defaults(command=_report)

    convert = commands.add_parser("convert", help="JSON files to parquet files with a text column, folder to folder")
    convert.add_argument("folder", type=_location, help="searched at any depth for files of JSON, compressed ones too")
    convert.add_argument("to", type=_local_folder, help="the folder to write into")
    convert.add_argument("--text", default="text", help="the key that holds the text")
    convert.add_argument("--workers", type=_at_least(1), default=usable_cores())
    convert.set_defaults(command=_convert)

    train = commands.add_parser("train-tokenizer", help="train a byte-level BPE on the sources of a configuration")
    train.add_argument("config", help="yamls/prep/NAME.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--vocab-size", type=int, required=True)
    train.add_argument("--to", type=_local_folder, required=True, help="the folder to write it to: a new or empty one")
    train.add_argument(
        "--most-bytes", type=_at_least(1), default=1 << 28, help="text to learn from, spread over the sources"
    )
    train.set_defaults(command=_train_tokenizer)
    return parser


def _build(options: argparse.Namespace) -> int:
    from rich.console import Console

    from prep.build import build
    from prep.commands.dry_run import count, count_table
    from prep.commands.tables import document_table, stream_table
    from prep.config import PrepConfig
    from prep.execution.progress import observing
    from streaming_rwkv.config import load_config
    from streaming_rwkv.location import is_remote

    config = load_config(PrepConfig, options.config, overrides=options.overrides)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a log file has no width of its own
    started = time.monotonic()
    if options.dry_run:
        with observing(console, are_listed=False) as observer:
            records = count(config, observer=observer)
        console.print(count_table(records, config.edges))
        return 0
    if is_remote(config.out):
        print(f"{config.out}: work in progress is kept in {config.folder} (work=…)")
    with observing(console) as observer:
        built = build(config, observer=observer, fork=True, accept_changes=options.accept_changes)
    manifest = built.manifest
    if built.was_finished:
        print(f"{config.out}: already finished, nothing to do; fingerprint {manifest.fingerprint[:16]}")
        return 0
    console.print(stream_table(manifest))
    console.print(document_table(manifest))
    text_bytes = sum(stream.bytes for stream in manifest.streams)
    seconds = time.monotonic() - started
    print(
        f"{config.out}: {text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s, {text_bytes / 1e6 / seconds:.1f} MB/s; "
        f"fingerprint {manifest.fingerprint[:16]}"
    )
    return 0


def _upload(options: argparse.Namespace) -> int:
    from rich.console import Console

    from prep.dataset.upload import upload
    from prep.execution.progress import observing

    started = time.monotonic()
    with observing(Console(width=None if sys.stdout.isatty() else 140)) as observer:
        uploaded = upload(options.folder, options.to, observer=observer)
    fingerprint = uploaded.manifest.fingerprint[:16]
    if uploaded.was_there:
        print(f"{options.to}: already there, nothing to do; fingerprint {fingerprint}")
        return 0
    size = sum(shard.bytes for stream in uploaded.manifest.streams for shard in stream.shards) / 1e6
    seconds = time.monotonic() - started
    rate = f"{size:,.1f} MB of shards in {seconds:.1f} s, {size / seconds:.1f} MB/s"
    print(f"{options.to}: {rate}; fingerprint {fingerprint}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from prep.commands.inspect import show

    try:
        show(
            options.out,
            split=options.split,
            source=options.source,
            bucket=options.bucket,
            skip=options.skip,
            count=options.count,
        )
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail again
        return _BROKEN_PIPE
    return 0


def _verify(options: argparse.Namespace) -> int:
    from prep.dataset.verification import verify

    manifest = verify(options.out)
    packs = sum(stream.packs for stream in manifest.streams)
    print(f"{options.out}: whole; {len(manifest.streams)} streams, {packs:,} packs, {manifest.fingerprint}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from prep.commands.report import write_report

    print(write_report(options.out, to=options.to))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from prep.commands.convert import convert
    from streaming_rwkv.console import shown

    for file in convert(options.folder, options.to, text=options.text, workers=options.workers):
        rejected = "".join(f", {count} left out: {reason}" for reason, count in file.rejected.items())
        print(f"{shown(file.name)}: {file.documents:,} documents{rejected}{' (was there)' if file.was_there else ''}")
    return 0


def _train_tokenizer(options: argparse.Namespace) -> int:
    from prep.commands.train_tokenizer import train_tokenizer
    from prep.config import PrepConfig
    from streaming_rwkv.config import load_config

    config = load_config(PrepConfig, options.config, overrides=options.overrides)
    tokenizer = train_tokenizer(
        config.sources, vocab_size=options.vocab_size, to=options.to, most_bytes=options.most_bytes
    )
    print(f"{options.to}: {tokenizer.vocab_size} tokens; use it with tokenizer={options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
