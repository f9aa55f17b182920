"""Fused ops: each has a CUDA kernel, a C++ kernel and the PyTorch reference that defines them."""

from streaming_rwkv.ops.layer import (
    cast_together,
    cross_entropy_,
    definitions,
    mixed_projections,
    relu_squared_projection,
    wkv7_inputs,
    wkv7_output,
)
from streaming_rwkv.ops.time_mixing import wkv7

__all__ = [
    "cast_together",
    "cross_entropy_",
    "definitions",
    "mixed_projections",
    "relu_squared_projection",
    "wkv7",
    "wkv7_inputs",
    "wkv7_output",
]
