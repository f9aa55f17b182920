"""Loss by the position of a target in its document, in bins that are powers of two.

A document that `prep` cut at the largest bucket edge is several pieces, and positions count from the beginning of each:
the model's state begins anew there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streaming_rwkv.data.batch import Batch
from streaming_rwkv.ops.layer_reference import IGNORED

BINS = 32  # the last one ends at position 2³¹


def position_bin_name(number: int) -> str:
    """Return the positions of a bin, counted from 1: "1", "2", "3-4", "5-8" and so on."""
    first, last = (1 << (number - 1)) + 1 if number else 1, 1 << number
    return str(last) if first >= last else f"{first}-{last}"


def sums_by_position(nll: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the (BINS,) float64 sums of the losses and of the targets of each bin.

    Args:
        nll: (1, T) loss of each target, 0 where it is ignored.
    """
    device, bounds = nll.device, batch["cu_seqlens"].long()
    place = torch.arange(nll.shape[1], device=device)
    piece = torch.bucketize(place, bounds, right=True) - 1
    position = place - bounds[piece] + 1
    bins = torch.bucketize(position, 2 ** torch.arange(BINS - 1, device=device))
    zeros = torch.zeros(BINS, dtype=torch.float64, device=device)
    counted = (batch["targets"][0] != IGNORED).double()
    return zeros.index_add(0, bins, nll.detach()[0].double()), zeros.index_add(0, bins, counted)


def position_metrics(totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return loss and targets of each bin that has targets; losses weighted by targets add up to that of all packs.

    Args:
        totals: `LossByStream.totals`.
    """
    metrics = {}
    for number, (nll, targets) in enumerate(zip(totals["position_nll"], totals["position_targets"], strict=True)):
        if targets:
            name = position_bin_name(number)
            metrics[f"validation/loss_by_position/{name}"] = nll / targets
            metrics[f"validation/targets_by_position/{name}"] = targets
    return metrics
