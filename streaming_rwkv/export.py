"""Export a checkpoint to another format: `python -m streaming_rwkv.export`, as `streaming-rwkv export`."""

from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing

if __name__ == "__main__":
    exit_if_missing(*BASE, *TRAIN, extra="train")  # before imports that would end in a traceback
    from streaming_rwkv.inference.command_line import export

    raise SystemExit(export())
