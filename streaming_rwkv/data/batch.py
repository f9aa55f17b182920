"""Batches: packs joined to one row without padding, and cut into microbatches between packs.

Shapes: T inputs in the batch, P pieces, K packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming_rwkv.ops.layer_reference import IGNORED
from streaming_rwkv.shards import offsets_of

NO_STREAM = -1  # stream of a blank pack, which fills up a rank's last evaluation batch and is not counted


class Batch(TypedDict):
    """One row of documents without padding; state and token shift restart at every entry of `cu_seqlens`."""

    tokens: Tensor  # (1, T) int64, the inputs
    targets: Tensor  # (1, T) int64, IGNORED where there is no loss
    cu_seqlens: Tensor  # (P + 1,) int32, where pieces begin
    pack_starts: Tensor  # (K + 1,) int32, where packs begin within T
    streams: Tensor  # (K,) int64, the stream of each pack
    text_bytes: Tensor  # (K,) int64, UTF-8 bytes of text behind the targets of each pack
    num_targets: int  # targets that are not IGNORED; a plain number, so that it is not read from the device


def blank_pack(token: int, dtype: type[np.uint16] | type[np.uint32]) -> dict[str, Any]:
    """Return a pack of one input that is not counted, for a rank that has no packs left when others have."""
    return {
        "tokens": np.full(2, token, dtype),
        "lengths": np.array([2], np.uint32),
        "bytes": np.array([0], np.uint32),
        "stream": NO_STREAM,
    }


class Joined(NamedTuple):
    """Packs joined as they are stored, as a loader's worker sends them to the training process.

    They have a quarter (uint32) or an eighth (uint16) of the finished batch's bytes, and are sent through the pipe by
    value: each tensor would need a file descriptor and a new mapping of /dev/shm, which took longer than all the rest.
    """

    tokens: NDArray[np.uint16] | NDArray[np.uint32]  # (S,) stored tokens
    lengths: NDArray[np.uint32]  # (P,) stored tokens of each piece
    pieces: NDArray[np.int64]  # (K,) pieces of each pack
    streams: NDArray[np.int64]  # (K,)
    text_bytes: NDArray[np.int64]  # (K,)


def join(packs: Sequence[dict[str, Any]]) -> Joined:
    """Join packs of a PackDataset."""
    return Joined(
        tokens=np.concatenate([pack["tokens"] for pack in packs]),
        lengths=np.concatenate([pack["lengths"] for pack in packs]),
        pieces=np.array([len(pack["lengths"]) for pack in packs], np.int64),
        streams=np.array([pack["stream"] for pack in packs], np.int64),
        text_bytes=np.array([pack["bytes"].sum(dtype=np.int64) for pack in packs], np.int64),
    )


def finish(joined: Joined) -> Batch:
    """Return inputs and targets: a piece of m stored tokens has m - 1 inputs, and the m - 1 tokens that follow them."""
    lengths = joined.lengths.astype(np.int64)
    inputs = np.ones(len(joined.tokens), bool)
    inputs[offsets_of(lengths)[1:] - 1] = False  # the last stored token of a piece is only a target
    tokens = joined.tokens[inputs].astype(np.int64)
    targets = joined.tokens[1:][inputs[:-1]].astype(np.int64)
    cu_seqlens = offsets_of(lengths - 1)
    pack_starts = cu_seqlens[offsets_of(joined.pieces)]
    ignored = 0
    for pack in np.flatnonzero(joined.streams == NO_STREAM):
        targets[pack_starts[pack] : pack_starts[pack + 1]] = IGNORED
        ignored += int(pack_starts[pack + 1] - pack_starts[pack])
    return {
        "tokens": torch.from_numpy(tokens)[None],
        "targets": torch.from_numpy(targets)[None],
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "pack_starts": torch.from_numpy(pack_starts.astype(np.int32)),
        "streams": torch.from_numpy(joined.streams),
        "text_bytes": torch.from_numpy(joined.text_bytes),
        "num_targets": len(targets) - ignored,
    }


def collate(packs: Sequence[dict[str, Any]]) -> Batch:
    """Join packs into one row of inputs and targets."""
    return finish(join(packs))


def split_batch(batch: Batch, microbatch_packs: int | float | str | None) -> list[Batch]:
    """Cut a batch into microbatches of `microbatch_packs` packs; views, no copies."""
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
    """Return Composer's number of samples, the packs; if documents were counted, a resumed run would repeat data."""
    return len(batch["streams"])


def count_tokens(batch: Batch) -> dict[str, int]:
    """Return the numbers of inputs and of targets in the loss; Composer weights microbatches by the latter."""
    return {"total": batch["tokens"].numel(), "loss_generating": batch["num_targets"]}
