"""The WKV-7 time mixing op: one door, `wkv7`, to the CUDA kernel, the C++ kernel and the reference that defines both."""

from streaming_rwkv.ops.time_mixing import wkv7

__all__ = ["wkv7"]
