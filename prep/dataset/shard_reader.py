"""Reading shards of a finished data set, for `inspect` and `verify`: without streaming, checking everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from streaming_rwkv.mds import Pack, expand, read_packs
from streaming_rwkv.shards import LARGEST_SHARD_BYTES, DataError, ShardRecord, read_small_file


def read_shard(file: Path, record: ShardRecord, *, where: str | None = None) -> Iterator[Pack]:
    """Yield the packs of one shard; `where` names it in errors, by default as `file`.

    Raises:
        DataError: it is not the shard that `record` describes, or was not written by `prep`.
    """
    where = where or str(file)
    yield from read_packs(read_raw(file, record, where=where), record, where=where)


def read_raw(file: Path, record: ShardRecord, *, where: str) -> bytes:
    """Return the decompressed bytes of a shard.

    Raises:
        DataError: it is missing, or does not expand to the size in its record.
    """
    try:
        data = read_small_file(file, most=LARGEST_SHARD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{where}: missing; the manifest names it: restore it, or build again") from None
    raw = expand(data, record.raw_bytes)
    if raw is None:
        raise DataError(
            f"{where}: not a shard of this data set (it does not expand to the {record.raw_bytes} bytes that the "
            "manifest gives); restore it, or build again"
        )
    return raw
