"""The WKV-7 op: one door, `wkv7`, to a CUDA kernel, a C++ kernel and the reference that defines them."""

from streaming_rwkv.ops.time_mixing import wkv7

__all__ = ["wkv7"]
