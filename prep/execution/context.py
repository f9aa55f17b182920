"""What every task of one build knows: configuration, units, streams, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prep.config import PrepConfig
from prep.dataset.shard_writer import ShardFormat
from prep.inputs.files import Unit
from streaming_rwkv.shards import SPLITS, TOKENIZER_FOLDER, Split, bucket_bounds, columns, token_dtype
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

_MOST_AUDITED_UNITS = 4096  # or about so many: two minutes


@dataclass(frozen=True, kw_only=True)
class Job:
    """Pickled once for each worker; what is loaded on demand stays behind."""

    config: PrepConfig
    units: tuple[Unit, ...]
    vocab_size: int
    given_tokenizer: Tokenizer | None = None
    by_reference: bool = False
    """The ids come from the library that defines them: the fast one was found to differ."""

    @property
    def out(self) -> Path:
        """Where the data set is put together."""
        return self.config.folder

    @property
    def work(self) -> Path:
        return self.config.work_folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the builder had, or else the data set's own copy: on a cluster there may be no other."""
        tokenizer = self.given_tokenizer or load_tokenizer(self.out / TOKENIZER_FOLDER)
        if self.by_reference:
            tokenizer.use_reference()
        return tokenizer

    @property
    def token_dtype(self) -> Any:
        return token_dtype(self.vocab_size)

    @property
    def streams(self) -> list[tuple[Split, int, int]]:
        """(split, lower, upper) of a source's streams; a stream's index in here is what blocks are labelled with."""
        return [(split, lower, upper) for split in SPLITS for lower, upper in bucket_bounds(self.config.edges)]

    @property
    def shard_format(self) -> ShardFormat:
        return ShardFormat(
            columns=columns(self.vocab_size),
            compression_level=self.config.compression_level,
            shard_bytes=self.config.shard_bytes,
        )

    def audit_bytes(self, unit: Unit) -> int:
        """How much of its text is compared with the reference tokenizer's ids: 0 for most units of a large corpus.

        The process that compares them is one, however many the workers are.
        """
        each = -(-len(self.units) // _MOST_AUDITED_UNITS)
        return self.config.audit_bytes if int(unit.name, 16) % each == 0 else 0

    def __getstate__(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "units": self.units,
            "vocab_size": self.vocab_size,
            "by_reference": self.by_reference,
        }
