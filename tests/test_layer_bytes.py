"""A layer's bytes moved, launches and saved bytes, outside matrix products and WKV-7, stay within bounds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.fork_server import ROOT, ForkServer

PROGRAM = """
import json
from bench.layer_bytes import layer_cost
costs = [layer_cost(fused=fused, hidden_size=128, tokens=1024) for fused in (True, False)]
print(json.dumps([[*cost.forward.total(), *cost.backward.total(), cost.saved_bytes] for cost in costs]))
"""


def test_a_fused_layer_moves_launches_and_keeps_little(programs: ForkServer, tmp_path: Path) -> None:
    """Counted in a process of its own, where nothing else has hooks into torch."""
    (tmp_path / "count.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = programs.run([sys.executable, tmp_path / "count.py"], env=environment, timeout=600, check=True).stdout
    fused, eager = json.loads(output.splitlines()[-1])
    forward_bytes, forward_launches, backward_bytes, backward_launches, saved = fused
    assert forward_bytes + backward_bytes <= 300  # per channel and token; sums over tiles are dearest for short packs
    assert forward_launches <= 14
    assert backward_launches <= 24
    assert saved <= eager[4] / 2
    assert eager[0] + eager[2] > 1100  # the comparison is with what it was
