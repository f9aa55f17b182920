"""What a layer moves, launches and keeps outside matrix products and WKV-7 stays within bounds."""

from __future__ import annotations

from bench.layer_bytes import layer_cost


def test_a_fused_layer_moves_launches_and_keeps_little() -> None:
    fused, eager = (layer_cost(fused=fused, hidden_size=128, tokens=2048) for fused in (True, False))
    forward_bytes, forward_launches = fused.forward.total()
    backward_bytes, backward_launches = fused.backward.total()
    assert forward_bytes + backward_bytes <= 300  # per channel and token; sums over tiles are dearest for short packs
    assert forward_launches <= 14
    assert backward_launches <= 24
    assert fused.saved_bytes <= eager.saved_bytes / 2
    eager_bytes = eager.forward.total()[0] + eager.backward.total()[0]
    assert eager_bytes > 1100  # the comparison is with what it was
