"""`python -m streaming_rwkv.train yamls/NAME.yaml [key=value …]`, the same as `train.py`."""

from __future__ import annotations

import argparse
import logging
import sys

from streaming_rwkv.config import UserError, load_config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="composer train.py", description="Train RWKV-7 from packed MDS shards.")
    parser.add_argument("config", help="a YAML file, e.g. yamls/stage2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("streaming_rwkv").setLevel(logging.INFO)
    try:
        # After the arguments are known: importing torch and composer takes seconds.
        from streaming_rwkv.train.config import RunConfig
        from streaming_rwkv.train.run import train

        return train(load_config(RunConfig, options.config, overrides=options.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
