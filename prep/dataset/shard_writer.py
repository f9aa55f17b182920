"""Writing packs as MDS shards, byte for byte as Streaming's MDSWriter does.

`import streaming` costs a process 5 seconds and 600 MB, and MDSWriter writes a valid index even when the code that
feeds it has failed; hence this module. A shard is

    uint32 number of samples · uint32 offsets of all samples and of the end · JSON of the writer's settings · samples

and a sample is the uint32 size of each column followed by the columns, sorted by name. Each column is a
one-dimensional array whose type is in the settings: one byte for the type of its length, its length, its values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from prep.dataset.names import shard_name
from streaming_rwkv.shards import INDEX_NAME, ShardRecord

Pack = dict[str, NDArray[Any]]  # column name to array


@dataclass(frozen=True, kw_only=True)
class ShardFormat:
    """The arguments of MDSWriter, besides the samples."""

    columns: dict[str, str]  # name to MDS encoding, e.g. ndarray:uint32
    compression_level: int
    shard_bytes: int

    @property
    def settings(self) -> dict[str, Any]:
        names = sorted(self.columns)
        return {
            "version": 2,
            "format": "mds",
            "compression": f"zstd:{self.compression_level}",
            "hashes": ["sha256"],
            "size_limit": self.shard_bytes,
            "column_names": names,
            "column_encodings": [self.columns[name] for name in names],
            "column_sizes": [None] * len(names),
        }


def write_shards(packs: Iterable[Pack], folder: Path, *, form: ShardFormat) -> list[ShardRecord]:
    """Write all packs to `folder` as shard.00000.mds.zstd, …, without an index and without flushing to the disk."""
    settings = json.dumps(form.settings, sort_keys=True).encode()
    compressor = zstandard.ZstdCompressor(level=form.compression_level)
    shards: list[ShardRecord] = []
    for samples in _group_samples(map(encode_sample, packs), room=form.shard_bytes - 8 - len(settings)):
        sizes = np.fromiter(map(len, samples), np.uint32, count=len(samples))
        offsets = np.zeros(len(samples) + 1, np.uint32)
        np.cumsum(sizes, out=offsets[1:])
        offsets += np.uint32(4 + offsets.nbytes + len(settings))
        raw = b"".join([np.uint32(len(samples)).tobytes(), offsets.tobytes(), settings, *samples])
        compressed = compressor.compress(raw)
        record = ShardRecord(
            basename=shard_name(len(shards)),
            bytes=len(compressed),
            sha256=hashlib.sha256(compressed).hexdigest(),
            raw_bytes=len(raw),
            raw_sha256=hashlib.sha256(raw).hexdigest(),
            packs=len(samples),
        )
        (folder / record.basename).write_bytes(compressed)
        shards.append(record)
    return shards


def _group_samples(samples: Iterable[bytes], *, room: int) -> Iterator[list[bytes]]:
    """Group samples into shards; a sample that is too large for a shard gets one of its own."""
    group: list[bytes] = []
    size = 0
    for sample in samples:
        if group and size + len(sample) + 4 > room:
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample) + 4
    if group:
        yield group


def encode_sample(pack: Pack) -> bytes:
    """Return a pack as an MDS sample."""
    columns = [_encode_array(pack[name]) for name in sorted(pack)]
    return np.fromiter(map(len, columns), np.uint32, count=len(columns)).tobytes() + b"".join(columns)


def _encode_array(array: NDArray[Any]) -> bytes:
    length = len(array)
    assert length > 0, "MDS has no empty arrays"
    if length < 1 << 8:
        head = bytes([4, length])
    elif length < 1 << 16:
        head = b"\x05" + length.to_bytes(2, "little")
    else:
        head = b"\x06" + length.to_bytes(4, "little")
    return head + array.tobytes()


def index_bytes(shards: Iterable[ShardRecord], *, form: ShardFormat) -> bytes:
    """Return the content of the index.json of a folder of shards."""
    entries = []
    for record in shards:
        raw = {
            "basename": record.basename.removesuffix(".zstd"),
            "bytes": record.raw_bytes,
            "hashes": {"sha256": record.raw_sha256},
        }
        compressed = {"basename": record.basename, "bytes": record.bytes, "hashes": {"sha256": record.sha256}}
        entries.append({**form.settings, "raw_data": raw, "zip_data": compressed, "samples": record.packs})
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()


def write_index(shards: Iterable[ShardRecord], folder: Path, *, form: ShardFormat) -> str:
    """Write the index of `folder` and return its sha256."""
    content = index_bytes(shards, form=form)
    (folder / INDEX_NAME).write_bytes(content)
    return hashlib.sha256(content).hexdigest()
