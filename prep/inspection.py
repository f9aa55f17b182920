"""`inspect`: documents as the model will see them, one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prep.shard_reader import read_shard
from streaming_rwkv.shards import TOKENIZER_FOLDER, DataError, Manifest, StreamRecord, piece_bounds, read_manifest
from streaming_rwkv.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ShownPiece:
    """One piece of a document, decoded."""

    stream: str
    pack: int  # within the stream
    key: int
    start: int
    targets: int
    bytes: int
    begins: bool  # with bos
    ends: bool  # with eos
    text: str

    def __str__(self) -> str:
        where = f"{self.stream} pack {self.pack} document {self.key:016x}"
        head = f"── {where}: inputs {self.start}…{self.start + self.targets - 1}, {self.bytes} bytes ──"
        return f"{head}\n{'⟨bos⟩' if self.begins else '…'}{self.text}{'⟨eos⟩' if self.ends else '…'}"


def shown_pieces(out: str | Path, manifest: Manifest, streams: list[StreamRecord]) -> Iterator[ShownPiece]:
    """All pieces of `streams` in stored order. A character that is cut between two pieces shows as U+FFFD."""
    tokenizer = load_tokenizer(Path(out) / TOKENIZER_FOLDER)
    for stream in streams:
        packs = itertools.chain.from_iterable(
            read_shard(Path(out) / stream.path / shard.basename, shard) for shard in stream.shards
        )
        for number, pack in enumerate(packs):
            bounds = piece_bounds(pack["lengths"])
            for piece in range(len(pack["lengths"])):
                tokens = pack["tokens"][bounds[piece] : bounds[piece + 1]]
                start = int(pack["starts"][piece])
                yield ShownPiece(
                    stream=stream.path,
                    pack=number,
                    key=int(pack["keys"][piece]),
                    start=start,
                    targets=len(tokens) - 1,
                    bytes=int(pack["bytes"][piece]),
                    begins=start == 0,
                    ends=int(tokens[-1]) == tokenizer.eos_id,
                    text=tokenizer.decode(tokens),
                )


def selected(
    manifest: Manifest, *, split: str, source: str | None, bucket: str | None, where: str
) -> list[StreamRecord]:
    """The streams that match.

    Raises:
        DataError: none does.
    """
    streams = [
        stream
        for stream in manifest.streams
        if stream.split == split and source in (None, stream.source) and bucket in (None, stream.bucket)
    ]
    if not streams:
        there = ", ".join(stream.path for stream in manifest.streams)
        raise DataError(f"{where}: no stream {split}/{source or '*'}/{bucket or '*'}; it has {there}")
    return streams


def show(out: str, *, split: str, source: str | None, bucket: str | None, skip: int, count: int) -> None:
    """Print `count` pieces."""
    manifest = read_manifest(out)
    streams = selected(manifest, split=split, source=source, bucket=bucket, where=out)
    for piece in itertools.islice(shown_pieces(out, manifest, streams), skip, skip + count):
        print(piece)
