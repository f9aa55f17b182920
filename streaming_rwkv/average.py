"""Average a run's newest checkpoints: `python -m streaming_rwkv.average`; see `streaming_rwkv.inference.average`."""

from streaming_rwkv.extras import TRAIN, exit_if_missing

if __name__ == "__main__":
    exit_if_missing(*TRAIN, extra="train")  # before imports that would end in a traceback
    from streaming_rwkv.inference.average import main

    raise SystemExit(main())
