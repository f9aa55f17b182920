"""`python -m streaming_rwkv.train yamls/NAME.yaml [key=value …]`, the same as `train.py`."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing
from streaming_rwkv.processes import die_with_parent, end_with


def main(arguments: list[str] | None = None) -> int:
    if "LOCAL_RANK" in os.environ:  # a launcher's rank; a process of its own may well outlive its shell
        die_with_parent()
    exit_if_missing(*BASE, *TRAIN, extra="train")
    # Imports from here on take time; those of torch and composer, seconds, and come when the arguments are known.
    from streaming_rwkv.config import UserError, load_config

    parser = argparse.ArgumentParser(prog="composer train.py", description="Train RWKV-7 from packed MDS shards.")
    parser.add_argument("config", help="a YAML file, e.g. yamls/stage2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the run and one batch, and stop")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="with --dry-run: show a run on so many")
    options = parser.parse_intermixed_args(arguments)  # options may stand between settings
    if options.processes < 1:
        parser.error(f"--processes: found {options.processes}, expected 1 or more")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("streaming_rwkv").setLevel(logging.INFO)
    try:
        from streaming_rwkv.train.config import RunConfig

        config = load_config(RunConfig, options.config, overrides=options.overrides)
        # After the settings are known: importing torch, streaming and composer takes many seconds.
        from streaming_rwkv.train.dry_run import dry_run
        from streaming_rwkv.train.run import begin, fit

        if options.dry_run:
            return dry_run(config, processes=options.processes)
        run = begin(config)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks have met it: one of each node says so
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    try:
        return fit(run) if run is not None else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    end_with(main)
