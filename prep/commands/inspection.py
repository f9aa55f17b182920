"""`inspect`: documents as the model sees them."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from prep.dataset.finished import DataSet, open_data_set
from prep.dataset.shard_reader import read_shard
from streaming_rwkv.console import paged, shown, styled
from streaming_rwkv.shards import DataError, Manifest, StreamRecord, check_pack, offsets_of
from streaming_rwkv.tokenizer import Tokenizer

_SHOWN_IDS = 12  # at the beginning and at the end of a piece


@dataclass(frozen=True, kw_only=True)
class ShownPiece:
    """A decoded piece of a document."""

    stream: str
    shard: str  # the path in the data set
    pack: int  # index in the stream, or of `pieces_of_shard` in the shard
    key: int
    start: int
    targets: int
    bytes: int
    begins: bool  # True if it begins with bos
    ends: bool  # True if it ends with eos
    text: str
    ids: list[int]

    def __str__(self) -> str:
        where = f"{self.stream} pack {self.pack} document {self.key:016x}"
        head = f"── {where}: tokens {self.start}…{self.start + self.targets - 1}, {self.bytes} bytes ──"
        return f"{head}\n{'⟨bos⟩' if self.begins else '…'}{self.text}{'⟨eos⟩' if self.ends else '…'}"

    def shown_ids(self) -> str:
        """Return the first and last ids in a line."""
        if len(self.ids) <= 2 * _SHOWN_IDS:
            return f"ids {' '.join(map(str, self.ids))}"
        left_out = f"[{len(self.ids) - 2 * _SHOWN_IDS:,} more]"
        return " ".join(map(str, ["ids", *self.ids[:_SHOWN_IDS], left_out, *self.ids[-_SHOWN_IDS:]]))


def shown_pieces(data_set: DataSet, manifest: Manifest, streams: list[StreamRecord]) -> Iterator[ShownPiece]:
    """Yield all pieces of `streams` in stored order; a character cut between two pieces is shown as U+FFFD."""
    tokenizer = data_set.tokenizer(manifest)
    for stream in streams:
        packs = enumerate(
            (name, pack) for at in range(len(stream.shards)) for name, pack in _packs(data_set, stream, at)
        )
        for number, (name, pack) in packs:
            where = f"{data_set.location}/{stream.path}, pack {number}"
            yield from _pieces(pack, manifest, tokenizer, stream, shard=name, number=number, where=where)


def pieces_of_shard(
    data_set: DataSet, manifest: Manifest, stream: StreamRecord, shard: int, *, generator: random.Random
) -> Iterator[ShownPiece]:
    """Yield the pieces of one shard: first one of each pack, of those that begin a document, then the others."""
    tokenizer = data_set.tokenizer(manifest)
    packs = list(enumerate(_packs(data_set, stream, shard)))
    generator.shuffle(packs)
    chosen: set[tuple[int, int]] = set()
    for is_first in (True, False):
        for number, (name, pack) in packs:
            where = f"{data_set.location}/{name}, pack {number}"
            pieces = list(_pieces(pack, manifest, tokenizer, stream, shard=name, number=number, where=where))
            if is_first:
                begun = [at for at, piece in enumerate(pieces) if piece.begins]
                at = generator.choice(begun or range(len(pieces)))
                chosen.add((number, at))
                yield pieces[at]
            else:
                yield from (piece for at, piece in enumerate(pieces) if (number, at) not in chosen)


def random_pieces(
    data_set: DataSet, manifest: Manifest, streams: list[StreamRecord], *, seed: int
) -> Iterator[ShownPiece]:
    """Yield pieces of random shards, a stream as often as it has packs; each shard is used once."""
    generator = random.Random(seed)  # not for secrets
    shards = [(stream, at) for stream in streams for at in range(len(stream.shards))]
    # A weighted draw without replacement: the largest of u ** (1 / weight).
    shards.sort(key=lambda pair: generator.random() ** (len(pair[0].shards) / pair[0].packs), reverse=True)
    left = [pieces_of_shard(data_set, manifest, stream, at, generator=generator) for stream, at in shards]
    while left:
        for pieces in list(left):
            if (piece := next(pieces, None)) is None:
                left.remove(pieces)
            else:
                yield piece


def _pieces(
    pack: dict[str, NDArray[Any]],
    manifest: Manifest,
    tokenizer: Tokenizer,
    stream: StreamRecord,
    *,
    shard: str,
    number: int,
    where: str,
) -> Iterator[ShownPiece]:
    check_pack(pack, stream=stream, manifest=manifest, where=where)
    bounds = offsets_of(pack["lengths"])
    for piece in range(len(pack["lengths"])):
        tokens = pack["tokens"][bounds[piece] : bounds[piece + 1]]
        start = int(pack["starts"][piece])
        yield ShownPiece(
            stream=stream.path,
            shard=shard,
            pack=number,
            key=int(pack["keys"][piece]),
            start=start,
            targets=len(tokens) - 1,
            bytes=int(pack["bytes"][piece]),
            begins=start == 0,
            ends=int(tokens[-1]) == tokenizer.eos_id,
            text=tokenizer.decode(tokens),
            ids=tokens.tolist(),
        )


def _packs(data_set: DataSet, stream: StreamRecord, at: int) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    shard = stream.shards[at]
    name = f"{stream.path}/{shard.basename}"
    for file in data_set.files([(name, None)]):  # one by one, since usually only the first is needed
        for pack in read_shard(file, shard, where=f"{data_set.location}/{name}"):
            yield name, pack


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


def _matching(pieces: Iterable[ShownPiece], grep: str | None) -> Iterator[ShownPiece]:
    return (piece for piece in pieces if grep is None or grep.casefold() in piece.text.casefold())


def run(options: argparse.Namespace) -> int:
    """Print pieces of a data set; return the exit status."""
    is_found = False
    # A search reads everything, and what is skipped is skipped in the stored order.
    in_order = options.in_order or options.skip > 0 or options.grep is not None
    with open_data_set(options.out) as data_set:
        manifest = data_set.manifest()
        streams = selected(
            manifest, split=options.split, source=options.source, bucket=options.bucket, where=options.out
        )
        with paged() as output:
            # Without a variable for the generator: it must be closed before the data set is.
            for piece in itertools.islice(
                _matching(
                    shown_pieces(data_set, manifest, streams)
                    if in_order
                    else random_pieces(data_set, manifest, streams, seed=options.seed),
                    options.grep,
                ),
                min(options.skip, sys.maxsize),
                min(options.skip + options.count, sys.maxsize),
            ):
                is_found = True
                head, _, text = shown(str(piece), lines=True).partition("\n")
                print(styled(head, "heading", stream=sys.stdout), text, sep="\n", file=output)
                if options.ids:
                    print(piece.shown_ids(), file=output)
    if options.count and not is_found:
        which = "document" if options.grep is None else f"document with {shown(options.grep)!r}"
        skipped = f" after the first {options.skip}" if options.skip else ""
        print(f"{shown(options.out)}: no {which}{skipped}", file=sys.stderr)
    return 0
