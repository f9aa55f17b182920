"""Generate text from a checkpoint: `python -m streaming_rwkv.generate`; see `streaming_rwkv.inference.generate`."""

from streaming_rwkv.inference.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
