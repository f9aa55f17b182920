"""The element-wise parts of an RWKV-7 layer as fused ops, around its matrix products and WKV-7.

    x ─┬─ norm_mix ── projections ── wkv7_inputs ── wkv7 ── wkv7_output ── projection ─┐ the branch, which the next
       └── + branch ─────────────────────────────────────────────────────────────────┘ norm_mix adds to x
    x ─┬─ norm_mix ── projection ── relu_squared ── projection ─┐
       └── + branch ───────────────────────────────────────────┘

Each reads and writes a number once, computes in float32 and rounds once. The backward passes compute again what is
cheap: a layer keeps no mixed inputs and no squared activations; the kernels that compute their gradients return them.
float32 and bfloat16 run in kernels, C++ on the CPU and CUDA on the GPU; float64 and widths that are no multiple of 64
run in `layer_reference`, the definition. Gradients of parameters are sums of sums over tiles of tokens, in one order.

Shapes: B rows, T tokens, C width, H heads, N head size, M mixes, D documents, V vocabulary, K tiles.
"""

from __future__ import annotations

from streaming_rwkv.ops.layer.casts import cast_together
from streaming_rwkv.ops.layer.dispatch import definitions
from streaming_rwkv.ops.layer.inputs import wkv7_inputs
from streaming_rwkv.ops.layer.loss import cross_entropy_
from streaming_rwkv.ops.layer.output import wkv7_output
from streaming_rwkv.ops.layer.projections import mixed_projections
from streaming_rwkv.ops.layer.relu_squared import relu_squared_projection

__all__ = [
    "cast_together",
    "cross_entropy_",
    "definitions",
    "mixed_projections",
    "relu_squared_projection",
    "wkv7_inputs",
    "wkv7_output",
]
