"""Intermediate files: tokenized pieces sorted by stream, the documents' hashes, and the duplicates among them.

pieces.bin consists of blocks, one for each stream in each stretch of a unit. A block is, for P pieces and S stored
tokens: lengths u32[P] · starts u32[P] · bytes u32[P] · documents u32[P] · keys u64[P] · tokens[S]. `documents` counts
the unit's documents, so that the duplicates among them can be left out later.

hashes.bin consists of runs, each sorted by hash, of N documents: hashes u64[N, 2] · documents u32[N].

bits.npy has one bit for each document of each unit, set for duplicates; first_bytes.npy, i64[units + 1], has the offset
in it of the bits of each unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.execution.task_store import FileRecord, WorkError
from streaming_rwkv.shards import offsets_of

PIECES_NAME = "pieces.bin"
HASHES_NAME = "hashes.bin"
DUPLICATES_TASK = "all_duplicates"
_FIRST_BYTES_NAME = "first_bytes.npy"
_BITS_NAME = "bits.npy"
COLUMNS: dict[str, Any] = {
    "lengths": np.uint32,
    "starts": np.uint32,
    "bytes": np.uint32,
    "documents": np.uint32,
    "keys": np.uint64,
}
_BYTES_PER_HASH = 2 * 8 + 4
_BYTES_PER_PIECE = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())


class Block(NamedTuple):
    """The location in pieces.bin of the pieces of one stream. A tuple, since a large corpus has millions of blocks."""

    stream: int
    offset: int
    pieces: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SortedPieces:
    """P pieces in the order of their streams, S stored tokens."""

    bounds: NDArray[np.int64]  # (streams + 1,) of the pieces of each stream
    columns: dict[str, NDArray[Any]]  # (P,) each
    tokens: NDArray[Any]  # (S,)

    @property
    def token_bounds(self) -> NDArray[np.int64]:
        """(streams + 1,) of the tokens of each stream."""
        return offsets_of(self.columns["lengths"])[self.bounds]


def write_blocks(stretch: Sequence[SortedPieces], file: HashedFile) -> list[Block]:
    """Write one block for each stream that has pieces in this stretch."""
    blocks: list[Block] = []
    for stream in range(len(stretch[0].bounds) - 1 if stretch else 0):
        offset = file.size
        pieces = [slice(part.bounds[stream], part.bounds[stream + 1]) for part in stretch]
        tokens = [slice(part.token_bounds[stream], part.token_bounds[stream + 1]) for part in stretch]
        if not sum(part.stop - part.start for part in pieces):
            continue
        for name, dtype in COLUMNS.items():
            for part, rows in zip(stretch, pieces, strict=True):
                file.write(part.columns[name][rows].astype(dtype, copy=False))
        for part, span in zip(stretch, tokens, strict=True):
            file.write(part.tokens[span])
        blocks.append(
            Block(
                stream=stream,
                offset=offset,
                pieces=int(sum(part.stop - part.start for part in pieces)),
                tokens=int(sum(part.stop - part.start for part in tokens)),
            )
        )
    return blocks


def read_block(file: IO[bytes], block: Block, *, tokens_into: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Read the columns of a block, and its tokens into `tokens_into` (block.tokens,).

    Raises:
        WorkError: the file ends before the block does.
    """
    file.seek(block.offset)
    content = file.read(block.pieces * _BYTES_PER_PIECE)
    read = file.readinto(tokens_into.data.cast("B"))  # type: ignore[attr-defined]
    if (len(content), read) != (block.pieces * _BYTES_PER_PIECE, tokens_into.nbytes):
        raise _cut_off(file.name)
    columns, at = {}, 0
    for name, dtype in COLUMNS.items():
        columns[name] = np.frombuffer(content, dtype, block.pieces, offset=at)
        at += columns[name].nbytes
    return columns


def _cut_off(file: str | Path) -> WorkError:
    return WorkError(
        f"{file}: is shorter than when it was written; does another program write or delete here? Run the same command "
        "again: damaged work is done again"
    )


def write_hashes(hashes: NDArray[np.uint64], documents: NDArray[np.uint32], file: HashedFile) -> int:
    """Write a run of (N, 2) hashes and return N."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    file.write(hashes[order])
    file.write(documents[order])
    return len(order)


def read_hashes(file: Path, runs: Sequence[int]) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint32]]]:
    """Yield the (N, 2) hashes and (N,) documents of each run, mapped into memory: only the parts in use are read.

    Raises:
        WorkError: the file ends before the last run does.
    """
    offset, size = 0, file.stat().st_size
    for count in runs:
        if not count:
            continue
        if offset + count * _BYTES_PER_HASH > size:
            raise _cut_off(file)
        hashes = np.memmap(file, np.uint64, "r", offset=offset, shape=(count, 2))
        documents = np.memmap(file, np.uint32, "r", offset=offset + hashes.nbytes, shape=(count,))
        offset += hashes.nbytes + documents.nbytes
        yield hashes, documents


def write_duplicates(bits: NDArray[np.uint8], first_bytes: NDArray[np.int64], folder: Path) -> tuple[str, ...]:
    """Write the duplicates to `folder` and return the names of the files."""
    np.save(folder / _FIRST_BYTES_NAME, first_bytes)
    np.save(folder / _BITS_NAME, bits)
    return _FIRST_BYTES_NAME, _BITS_NAME


class Duplicates:
    """The documents that are duplicates, read from the files of `write_duplicates`."""

    def __init__(self, folder: Path) -> None:
        self._first_bytes = np.load(folder / _FIRST_BYTES_NAME, mmap_mode="r")
        self._bits = np.load(folder / _BITS_NAME, mmap_mode="r")

    def are_among(self, documents: NDArray[np.uint32], *, unit: int) -> NDArray[np.bool_]:
        """Return the (N,) mask of a unit's documents that are duplicates."""
        of_unit = self._bits[self._first_bytes[unit] : self._first_bytes[unit + 1]]
        return ((of_unit[documents >> 3] >> (documents & 7)) & 1).astype(np.bool_)


class HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.size = 0
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_128()

    def write(self, content: bytes | NDArray[Any]) -> None:
        if not len(content):
            return
        data = content if isinstance(content, bytes) else np.ascontiguousarray(content).data.cast("B")
        # Not ndarray.tofile: its OSError does not say that the disk is full.
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def record(self) -> FileRecord:
        """Return the file's size and hash, after the last write."""
        self._file.flush()
        return FileRecord(bytes=self.size, xxh3=self._digest.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
