"""`python -m streaming_rwkv.train yamls/NAME.yaml [key=value …]`, the same as `train.py`."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from pathlib import Path

from streaming_rwkv.distributed import has_launcher, is_local_rank_zero
from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing
from streaming_rwkv.processes import die_with_parent, end_with, wait_for_launcher


def main(arguments: list[str] | None = None) -> int:
    """Run `train.py` with these arguments, by default the command line's, and return its exit status."""
    if has_launcher():  # a process without a launcher may outlive its shell
        die_with_parent()
    exit_if_missing(*BASE, *TRAIN, extra="train", is_reporting=is_local_rank_zero())
    # Imported after the call above, since imports take time; torch and composer follow when the arguments are known.
    from streaming_rwkv.config import UserError, load_config
    from streaming_rwkv.console import print_error, tolerate_any_encoding

    parser = argparse.ArgumentParser(prog="composer train.py", description="Train RWKV-7 from packed MDS shards.")
    parser.add_argument("config", help="a YAML file, e.g. yamls/stage2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the run and one batch, and exit")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="with --dry-run: number of processes of the run (default: 1)",
    )
    is_reporting = is_local_rank_zero()  # one rank of each node reports an error of all ranks
    tolerate_any_encoding()
    try:
        with contextlib.nullcontext() if is_reporting else contextlib.redirect_stderr(io.StringIO()):
            options = parser.parse_intermixed_args(arguments)  # options may be between settings
            if options.processes < 1:
                parser.error(f"--processes: found {options.processes}, expected 1 or more")
    except SystemExit as ending:
        if ending.code and not is_reporting:
            wait_for_launcher()
        raise
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("streaming_rwkv").setLevel(logging.INFO)
    try:
        from streaming_rwkv.train.config import RunConfig

        config = load_config(RunConfig, options.config, overrides=options.overrides)
        # After the settings have been checked: importing torch, streaming and composer takes many seconds.
        from streaming_rwkv.train.dry_run import dry_run
        from streaming_rwkv.train.faults import explained_faults
        from streaming_rwkv.train.fit import fit
        from streaming_rwkv.train.startup import start_up

        if options.dry_run:
            return dry_run(config, processes=options.processes)
        with explained_faults(Path(config.save_folder)):
            run = start_up(config)
    except UserError as error:
        if is_reporting:
            print_error(error)
        else:
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
