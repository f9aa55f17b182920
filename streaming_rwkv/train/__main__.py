"""`python -m streaming_rwkv.train yamls/NAME.yaml [key=value …]`, the same as `train.py`."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
from pathlib import Path

from streaming_rwkv.arguments import CommandParser
from streaming_rwkv.console import prepare_output, print_error
from streaming_rwkv.distributed import LauncherError, check_launcher, has_launcher, is_local_rank_zero
from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing
from streaming_rwkv.processes import (
    die_with_parent,
    end_with,
    start_resource_tracker,
    wait_for_launcher,
    without_garbage_collection,
)

STOPPED_BY_SIGNAL = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # Composer exits with them before training begins
_FEWEST_OPEN_FILES = 64  # of the imports, the shards and their shared memory


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """Run `train.py` with these arguments, by default the command line's, and return its exit status.

    Args:
        program: its name in the help.
    """
    prepare_output()
    try:
        check_launcher()
    except LauncherError as error:
        print_error(error)
        return 1
    if has_launcher():  # a process without a launcher may outlive its shell
        die_with_parent()
    exit_if_missing(*BASE, *TRAIN, extra="train", is_reporting=is_local_rank_zero())
    try:
        return _run(_parse(arguments, program or _program()))
    except KeyboardInterrupt:
        status = STOPPED_BY_SIGNAL[0]
    except SystemExit as ending:
        if ending.code not in STOPPED_BY_SIGNAL:
            raise
        status = int(ending.code)
    if is_local_rank_zero():
        print("stopped at once; the same command resumes from the newest checkpoint", file=sys.stderr, flush=True)
    return status


def _program() -> str:
    if has_launcher():
        return "composer train.py"
    script = Path(sys.argv[0]).name
    return f"python {script}" if script == "train.py" else "python -m streaming_rwkv.train"


def command_parser(program: str) -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        prog=program,
        description="Train RWKV-7 from packed MDS shards. The same command resumes a run that was stopped.",
        examples=[
            "{prog} yamls/tiny_cpu.yaml data.path=mine/shards save_folder=runs/mine",
            "{prog} yamls/stage2.yaml data.path=/data/stage2 --processes 8 --dry-run",
            "{prog} yamls/stage2.yaml data.path=s3://bucket/stage2 data.stages.0.tokens=1_000_000_000",
        ],
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; docs/settings.md lists its keys")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that replace those of the file"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the run and one batch, and exit")
    parser.add_argument(
        "--processes",
        metavar="N",
        help="number of processes on this machine, one for each GPU; also processes=N (default: 1, or as many as a "
        "launcher started)",
    )
    return parser


def _parse(arguments: list[str] | None, program: str) -> argparse.Namespace:
    parser = command_parser(program)
    is_reporting = is_local_rank_zero()  # one rank of each node reports an error of all ranks
    unsaid = io.StringIO()
    try:
        with contextlib.nullcontext() if is_reporting else contextlib.redirect_stderr(unsaid):
            options = parser.parse_intermixed_args(arguments)  # options may be between settings
            for override in [text for text in options.overrides if text.startswith("processes=")]:
                options.overrides.remove(override)
                if options.processes not in (None, override.partition("=")[2]):
                    parser.error(f"{override}: --processes is {options.processes}; give one of them")
                options.processes = override.partition("=")[2]
            options.processes = _count(parser, options.processes or "1")
            if options.processes > 1 and has_launcher() and not options.dry_run:
                parser.error("--processes: a launcher has started this process already; leave the option out")
    except SystemExit as ending:
        if ending.code and not is_reporting:
            wait_for_launcher()
            print(unsaid.getvalue(), end="", file=sys.stderr)
        raise
    return options


def _count(parser: argparse.ArgumentParser, text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        parser.error(f"--processes: found {text[:80]}, expected 1 or more, at most 999,999")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    from streaming_rwkv.config import UserError, load_config
    from streaming_rwkv.console import check_current_folder, log_to_terminal
    from streaming_rwkv.limits import LIMIT_ERRORS, check_open_files, explain_import, explain_limit

    is_reporting = is_local_rank_zero()
    log_to_terminal(logging.WARNING)
    logging.getLogger("streaming_rwkv").setLevel(logging.INFO)
    try:
        from streaming_rwkv.train.config import RunConfig
        from streaming_rwkv.train.early_checks import check_paths, check_replicas

        check_open_files(_FEWEST_OPEN_FILES)
        check_current_folder()
        config = load_config(RunConfig, options.config, overrides=options.overrides)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        check_replicas(config, processes=options.processes if options.dry_run else max(options.processes, launched))
        check_paths(config)
        if options.processes > 1 and not options.dry_run:
            from streaming_rwkv.train.launcher import launch

            command = [sys.executable, "-m", "streaming_rwkv.train", options.config, *options.overrides]
            return launch(command, processes=options.processes)
        if os.environ.get("RANK", "0") == "0":
            print("loading torch and Composer …", file=sys.stderr, flush=True)
        start_resource_tracker()
        # After settings and paths have been checked: importing torch, streaming and composer takes many seconds.
        with without_garbage_collection():
            from streaming_rwkv.train.dry_run import dry_run
            from streaming_rwkv.train.faults import explained_faults
            from streaming_rwkv.train.fit import fit
            from streaming_rwkv.train.startup import start_up

        with explained_faults(Path(config.save_folder)):
            if options.dry_run:
                return dry_run(config, processes=options.processes)
            run = start_up(config)
    except UserError as error:
        if not is_reporting and not isinstance(error, LauncherError):
            wait_for_launcher()
        print_error(error)  # if nothing has ended this rank, no other has reported it
        return 1
    except LIMIT_ERRORS as error:  # of the imports
        reason = explain_limit(error) or explain_import(error)
        if reason is None:
            raise
        print_error(UserError(reason))  # of every rank: others may have had what this one lacks
        if not is_reporting:
            wait_for_launcher()
        return 1
    try:
        with explained_faults(Path(config.save_folder)):
            return fit(run) if run is not None else 0
    except UserError as error:
        print_error(error)
        return 1


if __name__ == "__main__":
    end_with(main)
