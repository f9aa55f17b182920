"""Loss by position, on losses that are chosen by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streaming_rwkv.data.batch import blank_pack, collate
from streaming_rwkv.train.composer_model import LossByStream
from streaming_rwkv.train.position import BINS, position_bin_name, position_metrics, sums_by_position


def pack(lengths: list[int]) -> dict[str, Any]:
    """Documents with these numbers of targets."""
    stored = [length + 1 for length in lengths]
    return {
        "tokens": np.zeros(sum(stored), np.uint16), "lengths": np.array(stored, np.uint32),
        "bytes": np.array(lengths, np.uint32), "stream": 0,
    }  # fmt: skip


def test_bins_are_powers_of_two() -> None:
    assert [position_bin_name(number) for number in range(6)] == ["1", "2", "3-4", "5-8", "9-16", "17-32"]
    assert position_bin_name(15) == "16385-32768"


def test_positions_begin_anew_in_each_document_and_blank_packs_are_not_counted() -> None:
    batch = collate([pack([5, 2]), pack([9]), blank_pack(0, np.uint16)])
    losses = [1.0, 2, 3, 4, 5, 10, 20, *range(100, 109), 0]
    nll, targets = sums_by_position(torch.tensor([losses]), batch)
    #                          1              2             3-4                      5-8                       9-16
    assert nll[:5].tolist() == [1 + 10 + 100, 2 + 20 + 101, 3 + 4 + 102 + 103, 5 + 104 + 105 + 106 + 107, 108]
    assert targets[:5].tolist() == [3, 3, 4, 5, 1]
    assert targets.sum() == batch["num_targets"] == 16
    assert not targets[5:].any()
    assert len(targets) == BINS


def test_the_bins_weighted_by_their_targets_add_up_to_the_total() -> None:
    metric = LossByStream(1)
    generator = torch.Generator().manual_seed(3)
    total = count = 0.0
    for lengths in ([700, 300, 1], [40, 2000], [17] * 9):
        batch = collate([pack(lengths)])
        nll = torch.rand(batch["targets"].shape, generator=generator, dtype=torch.float64)
        metric.update(nll.sum()[None], batch, nll)
        total, count = total + nll.sum().item(), count + nll.numel()
    assert metric.compute().item() == pytest.approx(total / count, rel=1e-12)
    metrics = position_metrics(metric.totals)
    losses = {name.rpartition("/")[2]: value for name, value in metrics.items() if "loss_by" in name}
    targets = {name.rpartition("/")[2]: value for name, value in metrics.items() if "targets_by" in name}
    assert list(losses) == list(targets) == [position_bin_name(number) for number in range(12)]
    assert sum(targets.values()) == count
    # float64 sums in another order
    assert sum(losses[name] * targets[name] for name in losses) / count == pytest.approx(total / count, rel=1e-12)
