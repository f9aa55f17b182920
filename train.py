"""`composer train.py yamls/NAME.yaml [key=value …]`: train a run on every process that the launcher starts."""

from streaming_rwkv.processes import end_with
from streaming_rwkv.train.__main__ import main

if __name__ == "__main__":
    end_with(main)
