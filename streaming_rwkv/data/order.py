"""Order of one stream's packs: each pack once per pass, shuffled within blocks of shards.

A permutation of all packs would use every shard all the time, and a cache of a few shards would download each of
them thousands of times per pass. So the shards are permuted and cut into blocks, and packs are permuted within a block:
each shard is needed only in one short part of a pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streaming_rwkv.shards import offsets_of

Ints = NDArray[np.int64]


def permutation(size: int, *, key: str) -> Ints:
    """Return a permutation of range(size) that depends only on `key`.

    Philox's raw output is a published algorithm; `Generator.permutation` may change between numpy versions, and with
    it the packs that a resumed run would see.
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    draws = np.random.Philox(key=seed).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


def fraction(*, key: str) -> float:
    """Return a number in [1/16, 15/16) that depends only on `key`."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return 1 / 16 + 7 / 8 * (seed / 2**64)


class StreamOrder:
    """Packs of one stream in training order, pass after pass.

    Args:
        packs_per_shard: packs in each shard, in the order of the index.
        key: determines the order; consists of the seed and the stream's name.
        block_shards: number of shards whose packs are shuffled together.
    """

    def __init__(self, packs_per_shard: list[int], *, key: str, block_shards: int) -> None:
        self.packs_per_shard = np.asarray(packs_per_shard, np.int64)
        self.first_pack = offsets_of(self.packs_per_shard)[:-1]
        self.packs = int(self.packs_per_shard.sum())
        self.key = key
        self.block_shards = block_shards
        self._layout = lru_cache(maxsize=2)(self._compute_layout)
        # A chunk of steps rarely spans more than the end of one block and the beginning of the next.
        self._block = lru_cache(maxsize=2)(self._compute_block)

    def _compute_layout(self, pass_number: int) -> tuple[list[Ints], Ints]:
        """Return the shards of each block, and the position at which each block begins in the pass."""
        shards = permutation(len(self.packs_per_shard), key=f"{self.key}/pass {pass_number}/shards")
        blocks = [shards[i : i + self.block_shards] for i in range(0, len(shards), self.block_shards)]
        sizes = [int(self.packs_per_shard[block].sum()) for block in blocks]
        return blocks, offsets_of(sizes)

    def _compute_block(self, pass_number: int, block: int) -> Ints:
        shards = self._layout(pass_number)[0][block]
        packs = np.concatenate([self.first_pack[s] + np.arange(self.packs_per_shard[s]) for s in shards])
        return packs[permutation(len(packs), key=f"{self.key}/pass {pass_number}/block {block}")]

    def take(self, start: int, stop: int) -> Ints:
        """Return the packs (indices within the stream) at positions start … stop - 1, counted over all passes."""
        parts = list(self._parts(start, stop))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _parts(self, start: int, stop: int) -> Iterator[Ints]:
        while start < stop:
            pass_number, position = divmod(start, self.packs)
            bounds = self._layout(pass_number)[1]
            block = int(np.searchsorted(bounds, position, side="right")) - 1
            count = min(stop - start, int(bounds[block + 1]) - position)
            offset = position - int(bounds[block])
            yield self._block(pass_number, block)[offset : offset + count]
            start += count


class PartialOrder:
    """Part of a stream's packs in training order, pass after pass, as if the stream had no others.

    The packs are those with which a pass in another order would begin, so they are in few shards.
    """

    def __init__(self, packs_per_shard: list[int], *, key: str, block_shards: int, packs: int) -> None:
        choice = StreamOrder(packs_per_shard, key=f"{key}/part", block_shards=block_shards)
        self.chosen = np.sort(choice.take(0, packs))
        shards = np.searchsorted(choice.first_pack, self.chosen, side="right") - 1
        counts = np.unique(shards, return_counts=True)[1]
        self.order = StreamOrder(counts.tolist(), key=key, block_shards=block_shards)
        self.packs = packs

    def take(self, start: int, stop: int) -> Ints:
        """Return the packs (indices within the whole stream) at positions start … stop - 1, over all passes."""
        return self.chosen[self.order.take(start, stop)]


Order = StreamOrder | PartialOrder


def stream_order(packs_per_shard: list[int], *, key: str, block_shards: int, share: float) -> Order:
    """Return the order of a stream, or of a part of it, of at least one pack.

    Args:
        share: part of the packs, above 0; 1 takes all.
    """
    if share == 1:
        return StreamOrder(packs_per_shard, key=key, block_shards=block_shards)
    packs = max(1, round(share * sum(packs_per_shard)))
    return PartialOrder(packs_per_shard, key=key, block_shards=block_shards, packs=packs)
