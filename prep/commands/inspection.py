"""`inspect`: documents as the model sees them."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from prep.dataset.finished import DataSet, open_data_set
from prep.dataset.shard_reader import read_shard
from streaming_rwkv.console import shown
from streaming_rwkv.shards import DataError, Manifest, StreamRecord, check_pack, offsets_of

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell shows it


@dataclass(frozen=True, kw_only=True)
class ShownPiece:
    """A decoded piece of a document."""

    stream: str
    pack: int  # index in the stream
    key: int
    start: int
    targets: int
    bytes: int
    begins: bool  # True if it begins with bos
    ends: bool  # True if it ends with eos
    text: str

    def __str__(self) -> str:
        where = f"{self.stream} pack {self.pack} document {self.key:016x}"
        head = f"── {where}: inputs {self.start}…{self.start + self.targets - 1}, {self.bytes} bytes ──"
        return f"{head}\n{'⟨bos⟩' if self.begins else '…'}{self.text}{'⟨eos⟩' if self.ends else '…'}"


def shown_pieces(data_set: DataSet, manifest: Manifest, streams: list[StreamRecord]) -> Iterator[ShownPiece]:
    """Yield all pieces of `streams` in stored order; a character cut between two pieces is shown as U+FFFD."""
    tokenizer = data_set.tokenizer(manifest)
    for stream in streams:
        for number, pack in enumerate(_packs(data_set, stream)):
            where = f"{data_set.location}/{stream.path}, pack {number}"
            check_pack(pack, stream=stream, manifest=manifest, where=where)
            bounds = offsets_of(pack["lengths"])
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


def _packs(data_set: DataSet, stream: StreamRecord) -> Iterator[dict[str, NDArray[Any]]]:
    names = [f"{stream.path}/{shard.basename}" for shard in stream.shards]
    for name, shard in zip(names, stream.shards, strict=True):  # one by one, since usually only the first is needed
        for file in data_set.files([(name, None)]):
            yield from read_shard(file, shard, where=f"{data_set.location}/{name}")


def selected(
    manifest: Manifest, *, split: str, source: str | None, bucket: str | None, where: str
) -> list[StreamRecord]:
    """Return the streams that match.

    Raises:
        DataError: no stream matches.
    """
    streams = [
        stream
        for stream in manifest.streams
        if stream.split == split and source in (None, stream.source) and bucket in (None, stream.bucket)
    ]
    if not streams:
        of_split = [stream for stream in manifest.streams if stream.split == split]
        sources = ", ".join(dict.fromkeys(stream.source for stream in of_split)) or "none"
        buckets = ", ".join(dict.fromkeys(stream.bucket for stream in of_split)) or "none"
        raise DataError(
            f"{where}: no stream {split}/{source or '*'}/{bucket or '*'}; {split} has the sources {sources} and the "
            f"buckets {buckets}"
        )
    return streams


def run(options: argparse.Namespace) -> int:
    """Print pieces of a data set; return the exit status."""
    try:
        with open_data_set(options.out) as data_set:
            manifest = data_set.manifest()
            streams = selected(
                manifest, split=options.split, source=options.source, bucket=options.bucket, where=options.out
            )
            end = options.skip + options.count
            # Without a variable for the generator: it must be closed before the data set is.
            for piece in itertools.islice(shown_pieces(data_set, manifest, streams), options.skip, end):
                print(shown(str(piece), lines=True))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail again
        return _BROKEN_PIPE
    return 0
