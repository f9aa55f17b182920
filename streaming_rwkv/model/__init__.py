"""RWKV-7 language models: configuration, layers, initialization, and weights in the formats of other programs."""
