"""Packs to one row without padding, and back to microbatches between packs.

Shapes: T inputs in the batch, P pieces, K packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a target that is not trained on: torch's own default for cross-entropy
NO_STREAM = -1  # stream of a blank pack: it fills up a rank's last evaluation batch and counts for nothing


class Batch(TypedDict):
    """One row of documents; state and token shift restart at every entry of `cu_seqlens`."""

    tokens: Tensor  # (1, T) int64, the inputs
    targets: Tensor  # (1, T) int64, IGNORED where nothing is to be learnt
    cu_seqlens: Tensor  # (P + 1,) int32, where pieces begin
    pack_starts: Tensor  # (K + 1,) int32, where packs begin within T
    streams: Tensor  # (K,) int64, the stream of each pack
    text_bytes: Tensor  # (K,) int64, UTF-8 bytes of text behind the targets of each pack
    num_targets: int  # targets that are not IGNORED; a plain number, so that nobody asks the device for it


def blank_pack(token: int, dtype: type[np.uint16] | type[np.uint32]) -> dict[str, Any]:
    """A pack of one input that counts for nothing, for a rank that has run out while others have not."""
    return {
        "tokens": np.full(2, token, dtype),
        "lengths": np.array([2], np.uint32),
        "bytes": np.array([0], np.uint32),
        "stream": NO_STREAM,
    }


def collate(packs: Sequence[dict[str, Any]]) -> Batch:
    """Join packs; each piece of m stored tokens gives m - 1 inputs and the m - 1 tokens that follow them."""
    stored = np.concatenate([pack["tokens"] for pack in packs])
    lengths = np.concatenate([pack["lengths"] for pack in packs]).astype(np.int64)
    inputs = np.ones(len(stored), bool)
    inputs[np.cumsum(lengths) - 1] = False  # the last stored token of a piece is only a target
    follows = np.concatenate([[False], inputs[:-1]])
    tokens = stored[inputs].astype(np.int64)
    targets = stored[follows].astype(np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths - 1)])
    pieces = np.array([len(pack["lengths"]) for pack in packs])
    pack_starts = cu_seqlens[np.concatenate([[0], np.cumsum(pieces)])]
    streams = np.array([pack["stream"] for pack in packs], np.int64)
    blank = np.repeat(streams == NO_STREAM, np.diff(pack_starts))
    targets[blank] = IGNORED
    return {
        "tokens": torch.from_numpy(tokens)[None],
        "targets": torch.from_numpy(targets)[None],
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "pack_starts": torch.from_numpy(pack_starts.astype(np.int32)),
        "streams": torch.from_numpy(streams),
        "text_bytes": torch.tensor([int(pack["bytes"].sum(dtype=np.int64)) for pack in packs]),
        "num_targets": int(len(targets) - blank.sum()),
    }


def split_batch(batch: Batch, microbatch_packs: int | float | str | None) -> list[Batch]:
    """Cut between packs, `microbatch_packs` to a microbatch; views, no copies."""
    packs = len(batch["streams"])
    size = int(microbatch_packs) if isinstance(microbatch_packs, (int, float)) else packs
    if size >= packs:
        return [batch]
    starts, cu_seqlens = batch["pack_starts"].tolist(), batch["cu_seqlens"]
    microbatches: list[Batch] = []
    for first in range(0, packs, size):
        last = min(first + size, packs)
        low, high = starts[first], starts[last]
        targets = batch["targets"][:, low:high]
        inside = cu_seqlens[(cu_seqlens >= low) & (cu_seqlens <= high)]
        microbatches.append(
            {
                "tokens": batch["tokens"][:, low:high],
                "targets": targets,
                "cu_seqlens": inside - low,
                "pack_starts": batch["pack_starts"][first : last + 1] - low,
                "streams": batch["streams"][first:last],
                "text_bytes": batch["text_bytes"][first:last],
                "num_targets": int((targets != IGNORED).sum()),
            }
        )
    return microbatches


def count_packs(batch: Batch) -> int:
    """Composer's 'samples': MDS samples, so packs; never documents, or a resume would repeat data."""
    return len(batch["streams"])


def count_tokens(batch: Batch) -> dict[str, int]:
    """Inputs, and the targets that a loss is the mean over; Composer weights microbatches by the latter."""
    return {"total": batch["tokens"].numel(), "loss_generating": batch["num_targets"]}
