"""Evaluate a checkpoint on a data set: `python -m streaming_rwkv.evaluate`; see `streaming_rwkv.inference.evaluate`."""

from streaming_rwkv.extras import TRAIN, exit_if_missing

if __name__ == "__main__":
    exit_if_missing(*TRAIN, extra="train")  # before imports that would end in a traceback
    from streaming_rwkv.inference.evaluate import main

    raise SystemExit(main())
