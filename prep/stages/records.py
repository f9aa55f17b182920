"""Records of finished tasks: what a unit of input came to, and what a window was packed into."""

from __future__ import annotations

from typing import NamedTuple

from prep.document import LineCounts
from prep.execution.intermediate import Block
from prep.execution.task_store import DoneRecord
from streaming_rwkv.config import Config
from streaming_rwkv.shards import ShardRecord, Split, bucket_name, stream_path

LENGTHS_PER_DOUBLING = 4
FILL_BINS = 20


class StreamCount(NamedTuple):
    """A unit's counts for one stream, duplicates included."""

    documents: int
    pieces: int
    targets: int


class UnitRecord(DoneRecord):
    """The counts of a tokenized unit, and the layout of its intermediate files."""

    source: str
    documents_read: int
    documents: int  # without the rejected ones
    rejected: dict[str, int]  # by reason
    text_bytes: int
    targets_read: int
    targets_cut: int
    streams: list[StreamCount]
    blocks: list[Block]
    hash_runs: list[int]  # documents in each
    lengths: dict[int, int]  # documents by floor(LENGTHS_PER_DOUBLING * log2(length))
    line_counts: dict[str, LineCounts]  # of files of which the unit is only a part


class Window(Config):
    """A part of one stream that is packed by itself."""

    split: Split
    source: str
    lower: int
    upper: int
    number: int  # within the stream
    blocks: tuple[tuple[int, Block], ...]  # (unit, block)

    @property
    def stream(self) -> str:
        return stream_path(self.split, self.source, bucket_name(self.lower, self.upper))

    @property
    def tokens(self) -> int:
        return sum(block.tokens for _, block in self.blocks)

    @property
    def task(self) -> str:
        """The name of the task that packs the window."""
        return f"windows/{self.stream}/{self.number:06}"


class WindowRecord(DoneRecord):
    """The counts of a packed window, and its shards."""

    documents: int
    pieces: int
    targets: int
    bytes: int
    packs: int
    duplicates: int
    duplicate_targets: int
    shards: list[ShardRecord]  # numbered from 0 in each window
    fill: list[int]  # packs by how full they are, in FILL_BINS steps


PackedWindow = tuple[Window, WindowRecord]
