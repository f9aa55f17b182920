"""MDS shards and their indexes, read strictly: `verify` and training accept exactly the same files.

Streaming's own reader ignores a shard's head and what is left over in a sample, and takes an index as it is. Here
every byte has to be what MDSWriter writes. A shard is

    uint32 number of samples · uint32 offsets of all samples and of the end · JSON of the writer's settings · samples

and a sample is the uint32 size of each column followed by the columns, sorted by name. Each column is a
one-dimensional array whose type is in the settings: one byte for the type of its length, its length, its values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from streaming_rwkv.config import Config, ConfigError, validate
from streaming_rwkv.shards import (
    LARGEST_SHARD_BYTES,
    DataError,
    Manifest,
    ShardRecord,
    StreamRecord,
    check_pack,
    columns,
)

Pack = dict[str, NDArray[Any]]  # column name to array

_COLUMNS = (columns(1 << 16), columns(1 << 32))
_LENGTH_BYTES = {4: 1, 5: 2, 6: 4, 7: 8}  # bytes of an array's length, by the byte before it
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_MOST_SETTINGS_BYTES = 1 << 20


class _Settings(Config):
    """The settings of MDSWriter, which are in the head of each shard and in each entry of an index."""

    version: Literal[2]
    format: Literal["mds"]
    compression: str = Field(pattern=r"^zstd(:\d{1,2})?$")
    hashes: list[Literal["sha256"]] = Field(min_length=1, max_length=1)
    size_limit: int | str | None
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[None]

    @model_validator(mode="after")
    def _are_the_contracts(self) -> _Settings:
        found = dict(zip(self.column_names, self.column_encodings, strict=False))
        lengths = {len(self.column_names), len(self.column_encodings), len(self.column_sizes)}
        if found not in _COLUMNS or lengths != {len(found)} or self.column_names != sorted(found):
            raise ValueError(f"columns {found} are not the contract's; the shards were not written by prep")
        return self


class _Hashes(Config):
    sha256: str


class _FileInfo(Config):
    basename: str
    bytes: int
    hashes: _Hashes


class _IndexEntry(_Settings):
    raw_data: _FileInfo
    zip_data: _FileInfo
    samples: PositiveInt

    @model_validator(mode="after")
    def _has_one_name(self) -> _IndexEntry:
        # Streaming appends it to a cache folder: `../` or an absolute path would write outside it.
        raw = self.raw_data.basename
        if raw != self.zip_data.basename.removesuffix(".zstd") or "/" in raw:
            raise ValueError(f"raw file name {raw!r} is not that of its compressed form")
        return self

    @property
    def record(self) -> ShardRecord:
        raw, compressed = self.raw_data, self.zip_data
        return ShardRecord(
            basename=compressed.basename,
            bytes=compressed.bytes,
            sha256=compressed.hashes.sha256,
            raw_bytes=raw.bytes,
            raw_sha256=raw.hashes.sha256,
            packs=self.samples,
        )


class _Index(Config):
    version: Literal[2]
    shards: list[_IndexEntry]


def read_index(content: bytes, *, vocab_size: int, where: str) -> list[ShardRecord]:
    """Return the records of the shards that an index.json lists.

    Raises:
        DataError: other columns or encodings (such as pickles), names outside the folder, or fields that are missing,
            unknown or of the wrong kind.
    """
    try:
        index = validate(_Index, json.loads(content), where=where)
        records = [entry.record for entry in index.shards]
    except ConfigError as error:
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not an MDS index of prep's ({error})") from None
    for entry in index.shards:
        found = dict(zip(entry.column_names, entry.column_encodings, strict=True))
        if found != columns(vocab_size):
            raise DataError(f"{where}: columns {found} are not those of a vocabulary of {vocab_size} ids; build again")
    return records


def check_index(content: bytes, record: StreamRecord, *, vocab_size: int, where: str) -> None:
    """Refuse an index with which StreamingDataset would read or write anything but the manifest's shards.

    Raises:
        DataError: as `read_index`, or it lists other files or sizes than the manifest.
    """
    if read_index(content, vocab_size=vocab_size, where=where) != record.shards:
        raise DataError(f"{where}: does not list the manifest's shards; the data set was changed or damaged")


def expand(data: bytes, size: int) -> bytes | None:
    """Decompress `data`; return None unless it is one zstd frame, which expands to exactly `size` bytes.

    The size that the frame claims is not trusted, and never more than `size` bytes are produced.
    """
    if not data.startswith(_ZSTD_FRAME) or not 0 < size < LARGEST_SHARD_BYTES:
        return None
    try:
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            return None
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError):
        return None
    return plain if len(plain) == size else None


def check_raw_hash(raw: bytes, shard: ShardRecord, *, where: str) -> None:
    """Compare the hash of a decompressed shard with its record.

    Raises:
        DataError: it differs.
    """
    if hashlib.sha256(raw).hexdigest() != shard.raw_sha256:
        raise DataError(f"{where}: its decompressed bytes do not have the hash that the manifest gives; build again")


def read_packs(raw: bytes, shard: ShardRecord, *, where: str) -> Iterator[Pack]:
    """Yield the packs of a decompressed shard; `where` names it in errors.

    Raises:
        DataError: it is not the shard that the record describes, or was not written by `prep`.
    """
    settings, bounds = _read_head(raw, shard, where=where)
    names = list(zip(settings.column_names, settings.column_encodings, strict=True))
    types = {name: np.dtype(encoding.removeprefix("ndarray:")) for name, encoding in names}
    view = memoryview(raw)
    for number, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        yield _decode(view[begin:end], types, where=f"{where}: pack {number}")


def _read_head(raw: bytes, shard: ShardRecord, *, where: str) -> tuple[_Settings, NDArray[np.int64]]:
    packs = int.from_bytes(raw[:4], "little") if len(raw) >= 4 else 0
    if len(raw) != shard.raw_bytes or packs != shard.packs:
        raise DataError(
            f"{where}: {len(raw)} bytes and {packs} packs, the manifest says {shard.raw_bytes} and {shard.packs}; "
            "restore it, or build again"
        )
    begin = 4 + 4 * (packs + 1)
    if begin > len(raw):
        raise _not_a_shard(where, f"{len(raw)} bytes are too few for {packs} packs")
    bounds = np.frombuffer(raw, np.uint32, packs + 1, offset=4).astype(np.int64)
    if not begin <= bounds[0] <= begin + _MOST_SETTINGS_BYTES or bounds[-1] != len(raw) or (np.diff(bounds) < 1).any():
        raise _not_a_shard(where, "the offsets of its packs do not rise from its head to its end")
    try:
        return validate(_Settings, json.loads(raw[begin : bounds[0]]), where=where), bounds
    except (ValueError, RecursionError) as error:
        raise _not_a_shard(where, str(error)) from None
    except ConfigError as error:
        raise DataError(str(error)) from None


def _decode(sample: memoryview, types: dict[str, np.dtype[Any]], *, where: str) -> Pack:
    at = 4 * len(types)
    sizes = np.frombuffer(sample[:at], np.uint32).tolist() if len(sample) >= at else []
    if at + sum(sizes) != len(sample) or len(sizes) != len(types):
        raise _not_a_shard(where, f"columns of {sizes} bytes do not fill {len(sample)} bytes")
    pack = {}
    for (name, dtype), size in zip(types.items(), sizes, strict=True):
        head = 1 + _LENGTH_BYTES.get(sample[at], 0) if size else 0
        length = int.from_bytes(sample[at + 1 : at + head], "little")
        if not length or head + length * dtype.itemsize != size:
            raise _not_a_shard(where, f"column {name!r} has {size} bytes, which are no array of {dtype.name}")
        pack[name] = np.frombuffer(sample, dtype, length, offset=at + head)
        at += size
    return pack


def _not_a_shard(where: str, reason: str) -> DataError:
    return DataError(f"{where}: not a shard of this data set ({reason}); restore it, or build again")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What some of a stream's shards hold, in the terms of the stream's record."""

    packs: int = 0
    pieces: int = 0
    documents: int = 0
    targets: int = 0
    bytes: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def check_shard(raw: bytes, shard: ShardRecord, stream: StreamRecord, manifest: Manifest, *, where: str) -> Counts:
    """Check each pack of a decompressed shard, and count.

    Raises:
        DataError: it is not the shard that the record describes, or a pack breaks the contract.
    """
    pieces = documents = targets = text_bytes = 0
    for number, pack in enumerate(read_packs(raw, shard, where=where)):
        check_pack(pack, stream=stream, manifest=manifest, where=f"{where}: pack {number}")
        pieces += len(pack["lengths"])
        documents += int((pack["starts"] == 0).sum())
        targets += len(pack["tokens"]) - len(pack["lengths"])
        text_bytes += int(pack["bytes"].sum(dtype=np.int64))
    return Counts(packs=shard.packs, pieces=pieces, documents=documents, targets=targets, bytes=text_bytes)


def check_totals(found: Counts, stream: StreamRecord, *, where: str) -> None:
    """Compare the counts of all shards of a stream with its record.

    Raises:
        DataError: one differs.
    """
    for field, count in vars(found).items():
        if count != getattr(stream, field):
            raise DataError(f"{where}: holds {count} {field}, the manifest says {getattr(stream, field)}; build again")
