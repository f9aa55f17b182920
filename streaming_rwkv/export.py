"""Export a checkpoint to another format: `python -m streaming_rwkv.export`; see `streaming_rwkv.inference.export`."""

from streaming_rwkv.inference.export import main

if __name__ == "__main__":
    raise SystemExit(main())
