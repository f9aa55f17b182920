"""Generate text from a checkpoint: `python -m streaming_rwkv.generate`, as `streaming-rwkv generate`."""

from streaming_rwkv.extras import BASE, TRAIN, exit_if_missing

if __name__ == "__main__":
    exit_if_missing(*BASE, *TRAIN, extra="train")  # before imports that would end in a traceback
    from streaming_rwkv.inference.command_line import generate

    raise SystemExit(generate())
