"""Reading MDS shards as packs, for `inspect`, `verify` and `report`: without streaming, and checking everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from streaming_rwkv.shards import DataError, ShardRecord

_LENGTH_TYPES = {4: np.uint8, 5: np.uint16, 6: np.uint32, 7: np.uint64}


def read_shard(file: Path, record: ShardRecord, *, where: str | None = None) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the packs of one shard; `where` names it in errors, by default as `file`.

    Raises:
        DataError: it is not the shard that `record` describes, or was not written by `prep`.
    """
    where = where or str(file)
    try:
        raw = zstandard.ZstdDecompressor().decompress(file.read_bytes(), max_output_size=record.raw_bytes)
        settings, bounds = _head(raw)
        encodings = dict(zip(settings["column_names"], settings["column_encodings"], strict=True))
        types = {name: np.dtype(encoding.removeprefix("ndarray:")) for name, encoding in encodings.items()}
    except FileNotFoundError:
        raise DataError(f"{where}: missing; the manifest names it: restore it, or build again") from None
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a shard of this data set ({error}); restore it, or build again") from None
    if len(raw) != record.raw_bytes or len(bounds) - 1 != record.packs:
        raise DataError(
            f"{where}: {len(raw)} bytes and {len(bounds) - 1} packs, the manifest says {record.raw_bytes} and "
            f"{record.packs}; restore it, or build again"
        )
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        yield _decode_sample(raw[begin:end], types)


def _head(raw: bytes) -> tuple[dict[str, Any], NDArray[np.uint32]]:
    count = int(np.frombuffer(raw, np.uint32, 1)[0])
    bounds = np.frombuffer(raw, np.uint32, count + 1, offset=4)
    return json.loads(raw[4 + bounds.nbytes : bounds[0]]), bounds


def _decode_sample(sample: bytes, types: dict[str, np.dtype[Any]]) -> dict[str, NDArray[Any]]:
    sizes = np.frombuffer(sample, np.uint32, len(types))
    at = sizes.nbytes
    pack = {}
    for (name, dtype), size in zip(types.items(), sizes.tolist(), strict=True):
        head = 1 + np.dtype(_LENGTH_TYPES[sample[at]]).itemsize
        pack[name] = np.frombuffer(sample, dtype, (size - head) // dtype.itemsize, offset=at + head)
        at += size
    return pack
