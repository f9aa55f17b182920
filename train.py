"""`composer train.py yamls/NAME.yaml [key=value …]`: one training run on every process that the launcher starts."""

import sys

from streaming_rwkv.train.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
