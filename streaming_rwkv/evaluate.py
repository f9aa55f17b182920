"""Evaluate a checkpoint on a data set: `python -m streaming_rwkv.evaluate`; see `streaming_rwkv.inference.evaluate`."""

from streaming_rwkv.inference.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
