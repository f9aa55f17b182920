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
from typing import Any

import zstandard
from streaming import Stream
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.format.base.reader import FileInfo
from streaming.base.storage.download import CloudDownloader

from streaming_rwkv.filesystem import TEMPORARY_SUFFIX, FolderLock, atomic_file, lock_folder
from streaming_rwkv.location import checked_location, is_remote
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
from streaming_rwkv.storage import ObjectMissing, StorageError, Store, open_store
from streaming_rwkv.tokenizer import SAVED_FILES, load_tokenizer

logger = logging.getLogger(__name__)

LARGEST_SHARD_BYTES = 1 << 32  # MDS keeps offsets as uint32: nothing larger can be a shard
LARGEST_FILE_BYTES = 1 << 30  # of a manifest, an index, or a tokenizer's file
SHOWN_SHARDS = 3
VERIFIED = "verified"


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A checked data set, and where its shards are kept on this machine."""

    location: str
    store: Store | None  # of a location in object storage
    manifest: Manifest
    cache: Path
    lock: FolderLock | None  # held by the node's leader

    def streams(
        self, records: Sequence[StreamRecord], *, download_attempts: int, timeout_seconds: float
    ) -> list[Stream]:
        return [
            VerifiedStream(
                self.store,
                folder=record.path,
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
        LocationError: neither a local folder nor s3://bucket/prefix.
        UserError: another run is using the cache.
    """
    location = checked_location(location).rstrip("/")
    if not is_remote(location):
        location = str(Path(location).resolve())
    store = open_store(location, timeout_seconds=timeout_seconds) if is_remote(location) else None
    cache = Path(cache).resolve()
    lock = None
    if leader:
        lock = lock_folder(cache, what="data cache", remedy="give this run its own `data.cache`")
        _remove_stale_shared_memory(cache)
        _remove_unfinished_files(cache)
        content = _fetch(location, store, MANIFEST_NAME, to=cache, timeout_seconds=timeout_seconds)
    else:
        content = (cache / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(content, where=f"{location}/{MANIFEST_NAME}")
    # Each data set has its own folder, since shards of two data sets have the same names. The fingerprint would not do:
    # it is the same for shards that two versions of zstandard have compressed to different bytes.
    folder = cache / hashlib.sha256(content).hexdigest()[:16]
    if leader:
        records = [record for record in manifest.streams if record.split in splits]

        def check(record: StreamRecord) -> None:
            if not _has_hash(folder / record.path / INDEX_NAME, record.index_sha256):
                name = f"{record.path}/{INDEX_NAME}"
                content = _fetch(location, store, name, to=folder, timeout_seconds=timeout_seconds)
                try:
                    _check_index(content, record, manifest, where=f"{location}/{name}")
                except DataError:
                    (folder / name).unlink()
                    raise

        with ThreadPoolExecutor(8) as executor:
            list(executor.map(check, records))
    return ShardSet(location=location, store=store, manifest=manifest, cache=folder, lock=lock)


def check_shards(shard_set: ShardSet, records: Sequence[StreamRecord]) -> None:
    """Compare names and sizes of shards at the location with the manifest's; contents are when they are read.

    Raises:
        DataError: some are missing or of another size.
    """
    found: dict[str, int] = {}
    if shard_set.store is not None:
        for split in sorted({record.split for record in records}):
            found |= shard_set.store.list(f"{split}/")
    else:
        for record in records:
            found |= _sizes(shard_set.location, record.path)
    problems = []
    for record in records:
        for shard in record.shards:
            name = f"{record.path}/{shard.basename}"
            if found.get(name) != shard.bytes:
                size = f"{found[name]:,} bytes instead of {shard.bytes:,}" if name in found else "missing"
                problems.append(f"{name} ({size})")
    if problems:
        more = f" and {len(problems) - SHOWN_SHARDS} more" if len(problems) > SHOWN_SHARDS else ""
        raise DataError(
            f"{shard_set.location}: shards are not as the manifest says: {', '.join(problems[:SHOWN_SHARDS])}{more}; "
            f"restore them, or build again; `python -m prep verify {shard_set.location}` checks all of it"
        )


def _sizes(location: str, folder: str) -> dict[str, int]:
    try:
        with os.scandir(f"{location}/{folder}") as entries:
            return {f"{folder}/{entry.name}": entry.stat().st_size for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{location}/{folder}: cannot be read ({error.strerror}); check its permissions") from None


def copy_tokenizer(shard_set: ShardSet, folder: Path) -> None:
    """Put the data set's tokenizer beside a run, so that its checkpoints can be tried and exported without the data.

    Raises:
        DataError: what lies there is not the tokenizer that the manifest names.
    """
    source = f"{shard_set.location}/{TOKENIZER_FOLDER}"
    for name in SAVED_FILES[shard_set.manifest.tokenizer.kind]:
        _fetch(shard_set.location, shard_set.store, f"{TOKENIZER_FOLDER}/{name}", to=folder.parent, timeout_seconds=60)
    found = load_tokenizer(folder).sha256
    if found != shard_set.manifest.tokenizer.sha256:
        raise DataError(
            f"{source}: tokenizer {found[:16]}… is not the one that made the tokens "
            f"({shard_set.manifest.tokenizer.sha256[:16]}…); restore it, or rebuild with `python -m prep build`"
        )


def _fetch(location: str, store: Store | None, name: str, *, to: Path, timeout_seconds: float) -> bytes:
    """The bytes of the file `name` of the data set, freshly; the one below `to` is replaced in one step."""
    local, remote = to / name, f"{location}/{name}"
    local.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(local) as temporary:
        try:
            if store is not None:
                temporary.write_bytes(store.get_bytes(name, most=LARGEST_FILE_BYTES))
            elif Path(remote).exists():
                temporary.unlink(missing_ok=True)  # Streaming would take over what a killed process left
                CloudDownloader.get(None).download(remote, str(temporary), timeout_seconds)
            else:
                raise ObjectMissing(remote)
        except ObjectMissing:
            remedy = "build the data set with `python -m prep build`" if name == MANIFEST_NAME else "rebuild it"
            raise DataError(
                f"{remote}: not there, so this is no finished data set; {remedy}, or fix `data.path`"
            ) from None
        except StorageError as error:
            raise DataError(str(error)) from error
        except Exception as error:
            raise DataError(
                f"{remote}: cannot be read ({error}); check `data.path`, endpoint and credentials"
            ) from error
        return temporary.read_bytes()


def _has_hash(path: Path, sha256: str) -> bool:
    return path.exists() and sha256_of_file(path) == sha256


def _check_index(content: bytes, record: StreamRecord, manifest: Manifest, *, where: str) -> None:
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        raise DataError(f"{where}: does not have the hash that the manifest gives; the data set was changed or damaged")
    check_index(content, record, vocab_size=manifest.tokenizer.vocab_size, where=where)


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

    Streaming's own check is made once: a bad file stays in the cache, and is used or refused for ever after. Its own
    S3 client waits for ever for a server that sends a byte a second; `store` does not.
    """

    def __init__(self, store: Store | None, *, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.store = store
        self.folder = folder

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Make the raw file be there, and right; returns the change in bytes of the cache."""
        assert zip_info is not None
        raw = Path(self.local, self.split, raw_info.basename)
        delta = self.drop_if_bad(raw_info)
        if raw.exists():
            return delta
        data, left_over = self._compressed(zip_info)
        delta -= left_over
        # The frame's own claim of its size is not trusted: at most the bytes that the manifest allows are produced.
        plain = _expand(data, raw_info.bytes)
        if plain is None:
            raise DataError(
                f"{self._url(zip_info)}: does not expand to the {raw_info.bytes} bytes that the index gives"
            )
        with atomic_file(raw) as temporary:
            temporary.write_bytes(plain)
        return delta + raw_info.bytes

    def _compressed(self, info: FileInfo) -> tuple[bytes, int]:
        """A shard as it lies at the location, with the hash that the index gives; and how many bytes of it the cache
        has now less than it had."""
        path = Path(self.local, self.split, info.basename)
        left_over = path.stat().st_size if path.exists() else 0
        try:
            if self.store is None:
                return self._copied(path, info), left_over
            name, sha256 = f"{self.folder}/{info.basename}", info.hashes["sha256"]
            return self.store.get_bytes(name, most=info.bytes, sha256=sha256), left_over
        except DataError:
            raise
        except StorageError as error:
            raise DataError(str(error)) from error
        except Exception as error:
            raise DataError(f"{self._url(info)}: cannot be fetched ({error})") from error
        finally:
            path.unlink(missing_ok=True)

    def _copied(self, path: Path, info: FileInfo) -> bytes:
        """From a folder, by way of `path` in the cache, where a killed run may have left it."""
        for attempt in ("first", "second"):
            if not path.exists():
                self._download_file(info.basename)
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == info.hashes["sha256"]:
                return data
            logger.warning("%s: damaged on the %s attempt (%d bytes)", self._url(info), attempt, len(data))
            path.unlink()
        raise DataError(
            f"{self._url(info)}: does not have the hash that the index gives, fetched twice; restore the shard, or "
            "rebuild the data set with `python -m prep build`"
        )

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


def _remove_unfinished_files(cache: Path) -> None:
    """Remove what a run that was killed was about to write; the cache's limit does not count it."""
    for path in cache.rglob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
