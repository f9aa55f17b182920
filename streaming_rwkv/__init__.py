"""streaming-rwkv: pre-train RWKV-7 from packed, length-bucketed MDS shards.

Data flow, and direction of imports:

    prep → streaming_rwkv.{config, shards, tokenizer} ← data ← train → model → ops → kernels/

`shards` and `tokenizer` are the on-disk contract: they outlive the program that wrote the data, import neither
torch nor streaming, and are the only part of this package that `prep` knows.
"""

__version__ = "0.1.0"
