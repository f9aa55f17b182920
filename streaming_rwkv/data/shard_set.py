"""A data set at its location: manifest, indexes and shards, each checked before it is believed, and their cache.

Whatever lies on a remote, or was left in the cache by an earlier run, is taken as a claim. The manifest is parsed
strictly; each index must have the hash that the manifest gives, and describe just the shards that it lists; a shard
must have its hash after the download and again when it is found in the cache, and expands to just the bytes it said.
What is bad is fetched once more; then the run stops and names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import zstandard
from streaming import Stream
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.format.base.reader import FileInfo
from streaming.base.storage.download import CloudDownloader

from streaming_rwkv.processes import FolderLock, lock_folder
from streaming_rwkv.shards import (
    INDEX_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    StreamRecord,
    columns,
    parse_manifest,
    sha256_of_file,
)
from streaming_rwkv.tokenizer import SAVED_FILES, load_tokenizer

logger = logging.getLogger(__name__)

LARGEST_SHARD_BYTES = 1 << 32  # MDS keeps offsets as uint32: nothing larger can be a shard
VERIFIED = "verified"


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A checked data set, and where its shards are kept on this machine."""

    location: str
    manifest: Manifest
    cache: Path
    lock: FolderLock | None  # held by the node's leader

    def streams(
        self, records: Sequence[StreamRecord], *, download_attempts: int, timeout_seconds: float
    ) -> list[Stream]:
        return [
            VerifiedStream(
                remote=f"{self.location}/{record.path}",
                local=str(self.cache / record.path),
                download_retry=download_attempts,
                download_timeout=timeout_seconds,
                keep_zip=False,
            )
            for record in records
        ]


def open_shard_set(
    location: str | Path, *, cache: str | Path, splits: Sequence[str], timeout_seconds: float, leader: bool
) -> ShardSet:
    """Fetch and check manifest and indexes of `splits` into `cache`.

    Only the node's leader writes; others wait for it first and then read what it left.

    Raises:
        DataError: no data set there, or one that is not what it says.
        UserError: another run is using the cache.
    """
    location = str(location).rstrip("/")
    if "://" not in location:
        location = str(Path(location).resolve())
    cache = Path(cache).resolve()
    lock = None
    if leader:
        lock = lock_folder(cache, what="data cache", remedy="give this run its own `data.cache`")
        _remove_stale_shared_memory(cache)
        content = _fetch(f"{location}/{MANIFEST_NAME}", cache / MANIFEST_NAME, timeout_seconds=timeout_seconds)
    else:
        content = (cache / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(content, where=f"{location}/{MANIFEST_NAME}")
    # A folder of its own for each data set: shards of two data sets have the same names.
    folder = cache / manifest.fingerprint[:16]
    if leader:
        records = [record for record in manifest.streams if record.split in splits]

        def check(record: StreamRecord) -> None:
            index = folder / record.path / INDEX_NAME
            _fetch_index(f"{location}/{record.path}/{INDEX_NAME}", index, record, manifest, timeout_seconds)

        with ThreadPoolExecutor(8) as executor:
            list(executor.map(check, records))
    return ShardSet(location=location, manifest=manifest, cache=folder, lock=lock)


def copy_tokenizer(shard_set: ShardSet, folder: Path) -> None:
    """Put the data set's tokenizer beside a run, so that its checkpoints can be tried and exported without the data.

    Raises:
        DataError: what lies there is not the tokenizer that the manifest names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = f"{shard_set.location}/{TOKENIZER_FOLDER}"
    for name in SAVED_FILES[shard_set.manifest.tokenizer.kind]:
        _fetch(f"{source}/{name}", folder / name, timeout_seconds=60)
    found = load_tokenizer(folder).sha256
    if found != shard_set.manifest.tokenizer.sha256:
        raise DataError(
            f"{source}: tokenizer {found[:16]}… is not the one that made the tokens "
            f"({shard_set.manifest.tokenizer.sha256[:16]}…); restore it, or rebuild with `python -m prep build`"
        )


def _fetch(remote: str, local: Path, *, timeout_seconds: float) -> bytes:
    """The bytes at `remote`, freshly; `local` is replaced in one step."""
    fresh = local.with_name(local.name + ".fetching")
    fresh.unlink(missing_ok=True)
    if "://" not in remote and not Path(remote).exists():
        remedy = "build the data set with `python -m prep build`" if remote.endswith(MANIFEST_NAME) else "rebuild it"
        raise DataError(f"{remote}: not there, so this is no finished data set; {remedy}, or fix `data.path`")
    try:
        CloudDownloader.get(remote if "://" in remote else None).download(remote, str(fresh), timeout_seconds)
    except Exception as error:
        raise DataError(f"{remote}: cannot be read ({error}); check `data.path`, endpoint and credentials") from error
    content = fresh.read_bytes()
    fresh.replace(local)
    return content


def _fetch_index(remote: str, local: Path, record: StreamRecord, manifest: Manifest, timeout_seconds: float) -> None:
    if local.exists() and sha256_of_file(local) == record.index_sha256:
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    content = _fetch(remote, local, timeout_seconds=timeout_seconds)
    try:
        if hashlib.sha256(content).hexdigest() != record.index_sha256:
            raise DataError(
                f"{remote}: does not have the hash that the manifest gives; the data set was changed or damaged"
            )
        check_index(content, record, vocab_size=manifest.tokenizer.vocab_size, where=remote)
    except DataError:
        local.unlink()
        raise


def check_index(content: bytes, record: StreamRecord, *, vocab_size: int, where: str) -> None:
    """Refuse an index that would make StreamingDataset read or write anything but the manifest's shards.

    Raises:
        DataError: other columns or encodings (pickles above all), other files or sizes, or names outside the folder.
    """
    try:
        entries = json.loads(content)["shards"]
        for entry in entries:
            found = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
            if found != columns(vocab_size) or entry["format"] != "mds" or entry["version"] != 2:
                raise DataError(f"{where}: columns {found} are not the contract's; the shards were not written by prep")
            if not str(entry["compression"]).startswith("zstd"):
                raise DataError(f"{where}: compression {entry['compression']!r}; prep writes zstd")
            raw = entry["raw_data"]
            if raw["basename"] != entry["zip_data"]["basename"].removesuffix(".zstd") or "/" in raw["basename"]:
                raise DataError(f"{where}: raw file name {raw['basename']!r} is not that of its compressed form")
        found_shards = [
            (
                e["zip_data"]["basename"],
                e["zip_data"]["bytes"],
                e["zip_data"]["hashes"]["sha256"],
                e["raw_data"]["bytes"],
            )
            for e in entries
        ]
        packs = [entry["samples"] for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not an MDS index of prep's ({type(error).__name__}: {error})") from None
    expected = [(s.basename, s.bytes, s.sha256, s.raw_bytes) for s in record.shards]
    if found_shards != expected or packs != [shard.packs for shard in record.shards]:
        raise DataError(f"{where}: does not list the manifest's shards; the data set was changed or damaged")
    oversized = [shard.basename for shard in record.shards if shard.raw_bytes >= LARGEST_SHARD_BYTES]
    if oversized:
        raise DataError(f"{where}: {oversized[0]} claims to expand to more than {LARGEST_SHARD_BYTES} bytes")


class VerifiedStream(Stream):
    """A stream whose shards are compared with their hashes, in the download and in the cache.

    Streaming's own check is made once: a bad file stays in the cache, and is used or refused for ever after.
    """

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Make the raw file be there, and right; returns the change in bytes of the cache."""
        assert zip_info is not None
        folder = Path(self.local, self.split)
        raw = folder / raw_info.basename
        compressed = folder / zip_info.basename
        delta = self.drop_if_bad(raw_info)
        if raw.exists():
            return delta
        found = compressed.stat().st_size if compressed.exists() else 0
        data = None
        for attempt in ("first", "second"):
            if not compressed.exists():
                try:
                    self._download_file(zip_info.basename)
                except Exception as error:
                    raise DataError(f"{self._url(zip_info)}: cannot be fetched ({error})") from error
            data = compressed.read_bytes()
            compressed.unlink()
            if hashlib.sha256(data).hexdigest() == zip_info.hashes["sha256"]:
                break
            logger.warning("%s: damaged on the %s attempt (%d bytes)", self._url(zip_info), attempt, len(data))
            data = None
        if data is None:
            raise DataError(
                f"{self._url(zip_info)}: does not have the hash that the index gives, fetched twice; "
                "restore the shard, or rebuild the data set with `python -m prep build`"
            )
        # The frame's own claim of its size is not trusted: at most the bytes that the manifest allows are produced.
        plain = _expand(data, raw_info.bytes)
        if plain is None:
            raise DataError(
                f"{self._url(zip_info)}: does not expand to the {raw_info.bytes} bytes that the index gives"
            )
        partial = raw.with_name(raw.name + ".tmp")
        partial.write_bytes(plain)
        partial.replace(raw)
        return delta + raw_info.bytes - found

    def drop_if_bad(self, raw_info: FileInfo) -> int:
        """Remove the cached raw file if it is not what the index says; returns the change in bytes of the cache."""
        raw = Path(self.local, self.split, raw_info.basename)
        try:
            size = raw.stat().st_size
            if size == raw_info.bytes and sha256_of_file(raw) == raw_info.hashes["sha256"]:
                return 0
            raw.unlink()
        except FileNotFoundError:
            return 0
        logger.warning("%s: damaged in the cache; fetching it again", raw)
        return -size

    def _url(self, info: FileInfo) -> str:
        return f"{self.remote}/{info.basename}"


def _expand(data: bytes, size: int) -> bytes | None:
    """`data` decompressed if that gives just `size` bytes; never more than one byte beyond is produced."""
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        try:
            plain = reader.read(size)
            return plain if len(plain) == size and not reader.read(1) else None
        except zstandard.ZstdError:
            return None


def _remove_stale_shared_memory(cache: Path) -> None:
    """Remove Streaming's shared memory that names our cache.

    A run that was killed leaves it behind, and Streaming then refuses the folder ('Reused local directory'). We hold
    the cache's lock, so whoever made it is gone. Shared memory of other caches is left alone.
    """
    for path in Path("/dev/shm").glob(f"*_{LOCALS}"):
        try:
            names = path.read_bytes().split(b"\0")
        except (FileNotFoundError, PermissionError):
            continue
        if not any(os.fsencode(cache) + b"/" in name for name in names):
            continue
        prefix = path.name.removesuffix(LOCALS)
        for name in [*SHM_TO_CLEAN, VERIFIED]:
            (path.parent / f"{prefix}{name}").unlink(missing_ok=True)
