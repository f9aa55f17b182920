"""A data set at its location: manifest, indexes and shards, each verified before use, and their cache.

Nothing in object storage or in the cache is trusted. The manifest is parsed strictly. Each index must have the hash
that the manifest gives, and describe exactly the shards that it lists. A shard must have its hash after the download
and again when it is found in the cache, and must decompress to exactly its size. A damaged file is fetched once more;
then the run stops with an error that names it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from streaming_rwkv.data.setting_names import RUN_SETTINGS, SettingNames
from streaming_rwkv.data.streaming_compat import VerifiedStream, copy_file, remove_stale_shared_memory
from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import (
    LOCK_NAME,
    TEMPORARY_SUFFIX,
    FolderLock,
    atomic_file,
    is_disk_full,
    lock_folder,
    open_regular_file,
    temporary_path,
)
from streaming_rwkv.limits import limit_of
from streaming_rwkv.location import checked_location, is_remote
from streaming_rwkv.mds import check_index
from streaming_rwkv.outputs import CHECKPOINTS, check_outside
from streaming_rwkv.shards import (
    INDEX_NAME,
    LARGEST_FILE_BYTES,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    StreamRecord,
    missing_file,
    parse_manifest,
    sha256_of_file,
)
from streaming_rwkv.storage import ObjectMissing, Store, open_store
from streaming_rwkv.tokenizer import SAVED_FILES, Tokenizer, load_tokenizer_of
from streaming_rwkv.version import PROGRAM

logger = logging.getLogger(__name__)

SHOWN_SHARDS = 3
_FOLDER_NAME = re.compile(r"[0-9a-f]{16}")  # of a data set's shards in the cache


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A checked data set, and the folder of its shards on this machine."""

    location: str
    store: Store | None  # of a location in object storage
    manifest: Manifest
    cache: Path
    lock: FolderLock | None  # held by local rank 0

    def streams(
        self, records: Sequence[StreamRecord], *, download_attempts: int, timeout_seconds: float
    ) -> list[VerifiedStream]:
        return [
            VerifiedStream(
                self.store,
                record=record,
                manifest=self.manifest,
                remote=f"{self.location}/{record.path}",
                local=str(self.cache / record.path),
                download_retry=download_attempts,
                download_timeout=timeout_seconds,
                keep_zip=False,
            )
            for record in records
        ]


def open_shard_set(
    location: str | Path,
    *,
    cache: str | Path,
    splits: Sequence[str],
    timeout_seconds: float,
    fetch: bool,
    names: SettingNames = RUN_SETTINGS,
) -> ShardSet:
    """Open a data set, with the manifest and the indexes of `splits` in `cache`.

    Args:
        fetch: fetch and check them, and lock the cache; only local rank 0 does. The other ranks call this afterwards,
            and read its files.
        names: of the settings, for errors.

    Raises:
        DataError: there is no data set, or it is damaged.
        LocationError: the location is neither a local folder nor s3://bucket/prefix.
        UserError: another run is using the cache, or it is among the files of a data set or a run.
    """
    location = checked_location(location).rstrip("/")
    if not is_remote(location):
        location = str(Path(location).resolve())
    store = open_store(location, timeout_seconds=timeout_seconds) if is_remote(location) else None
    cache = Path(cache).resolve()
    lock = None
    if fetch:
        check_cache(cache, names=names)
        _check_free(cache, names=names)
        lock = lock_folder(cache, what="data cache", remedy=f"give this run its own `{names.cache}`")
        remove_stale_shared_memory(cache)
        _remove_unfinished_files(cache)
        content = _fetch(location, store, MANIFEST_NAME, to=cache, timeout_seconds=timeout_seconds, names=names)
    else:
        content = (cache / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(content, where=f"{location}/{MANIFEST_NAME}")
    # Each data set has its own folder, since shards of two data sets have the same names. The fingerprint would not do:
    # it is the same for shards that two versions of zstandard have compressed to different bytes.
    folder = cache / hashlib.sha256(content).hexdigest()[:16]
    if fetch:
        records = [record for record in manifest.streams if record.split in splits]

        def check(record: StreamRecord) -> None:
            if not _has_hash(folder / record.path / INDEX_NAME, record.index_sha256):
                name = f"{record.path}/{INDEX_NAME}"
                content = _fetch(location, store, name, to=folder, timeout_seconds=timeout_seconds, names=names)
                try:
                    _check_index(content, record, manifest, where=f"{location}/{name}")
                except DataError:
                    (folder / name).unlink()
                    raise

        with ThreadPoolExecutor(8) as executor:
            list(executor.map(check, records))
    return ShardSet(location=location, store=store, manifest=manifest, cache=folder, lock=lock)


def check_cache(cache: str | Path, *, names: SettingNames = RUN_SETTINGS) -> None:
    """Check that a cache is not in a data set or a checkpoint, and that it is a folder of its own in a run.

    Raises:
        UserError: files of the cache would be among theirs.
    """
    remedy = f"give another `{names.cache}`"
    check_outside(cache, what="data cache", remedy=remedy)
    if (Path(cache) / CHECKPOINTS).exists():
        raise UserError(f"{cache}: is a run's save folder, expected a folder for the data cache alone; {remedy}")


def _check_free(cache: Path, *, names: SettingNames) -> None:
    """Check that a folder without the lock of an earlier cache has no file that a cache would replace.

    Raises:
        UserError: it has a manifest of something else, or would look like a data set.
    """
    if (cache / LOCK_NAME).exists():
        return
    if found := [name for name in (MANIFEST_NAME, TOKENIZER_FOLDER) if (cache / name).exists()]:
        raise UserError(
            f"{cache}: has {' and '.join(found)}, but is no earlier data cache; give another `{names.cache}`, or move "
            "them away"
        )


def check_shards(shard_set: ShardSet, records: Sequence[StreamRecord]) -> None:
    """Compare names and sizes of the stored shards with the manifest; contents are verified when they are read.

    Raises:
        DataError: shards are missing or have another size.
    """
    found: dict[str, int | None] = {}
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
            size = found.get(name, -1)
            if size is None:
                problems.append(f"{name} (not a regular file)")
            elif size != shard.bytes:
                problems.append(f"{name} ({'missing' if size < 0 else f'{size:,} bytes instead of {shard.bytes:,}'})")
    if problems:
        more = f" and {len(problems) - SHOWN_SHARDS} more" if len(problems) > SHOWN_SHARDS else ""
        raise DataError(
            f"{shard_set.location}: shards are not as the manifest says: {', '.join(problems[:SHOWN_SHARDS])}{more}; "
            f"restore them, or build again; `{PROGRAM} verify {shard_set.location}` checks all of it"
        )


def cached_sizes(records: Sequence[StreamRecord]) -> list[int]:
    """Return the bytes that each shard takes in the cache, compressed and expanded."""
    return [shard.raw_bytes + shard.bytes for record in records for shard in record.shards]


def least_cache_bytes(records: Sequence[StreamRecord]) -> int:
    """Return the smallest limit of a cache of these streams: four of the largest shards, which Streaming requires."""
    return 4 * max(cached_sizes(records), default=0)


def _sizes(location: str, folder: str) -> dict[str, int | None]:
    """Return the bytes of each file in a folder, or None for what is no regular file."""
    try:
        with os.scandir(f"{location}/{folder}") as entries:
            return {f"{folder}/{entry.name}": entry.stat().st_size if entry.is_file() else None for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{location}/{folder}: cannot be read ({error.strerror}); check its permissions") from None


def copy_tokenizer(shard_set: ShardSet, folder: Path) -> Tokenizer:
    """Copy the data set's tokenizer to a run, so that its checkpoints can be used without the data set; return it.

    Raises:
        DataError: the stored tokenizer is not the one that the manifest names.
    """
    source = f"{shard_set.location}/{TOKENIZER_FOLDER}"
    for name in SAVED_FILES[shard_set.manifest.tokenizer.kind]:
        _fetch(shard_set.location, shard_set.store, f"{TOKENIZER_FOLDER}/{name}", to=folder.parent, timeout_seconds=60)
    return load_tokenizer_of(shard_set.manifest, folder, where=source)


def _fetch(
    location: str,
    store: Store | None,
    name: str,
    *,
    to: Path,
    timeout_seconds: float,
    names: SettingNames = RUN_SETTINGS,
) -> bytes:
    """Fetch the file `name` of the data set, replace the copy in `to` atomically, and return its bytes."""
    local, remote = to / name, f"{location}/{name}"
    local.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(local) as temporary:
        try:
            if store is not None:
                temporary.write_bytes(store.get_bytes(name, most=LARGEST_FILE_BYTES))
            elif Path(remote).exists():
                open_regular_file(Path(remote), most=LARGEST_FILE_BYTES).close()
                temporary.unlink(missing_ok=True)  # Streaming would take over what a killed process left
                copy_file(remote, temporary, timeout_seconds=timeout_seconds)
            else:
                raise ObjectMissing(remote)
        except ObjectMissing:
            raise missing_file(location, name, setting=names.path) from None
        except UserError as error:
            raise DataError(str(error)) from error
        except Exception as error:
            if is_disk_full(error):
                remedy = limit_of(error) or f"make space, or set `{names.cache}`"
                raise DataError(f"{local}: cannot be written ({error}); {remedy}") from error
            raise DataError(
                f"{remote}: cannot be read ({error}); check `{names.path}`, endpoint and credentials"
            ) from error
        return temporary.read_bytes()


def _has_hash(path: Path, sha256: str) -> bool:
    return path.exists() and sha256_of_file(path) == sha256


def _check_index(content: bytes, record: StreamRecord, manifest: Manifest, *, where: str) -> None:
    if hashlib.sha256(content).hexdigest() != record.index_sha256:
        raise DataError(f"{where}: does not have the hash that the manifest gives; the data set was changed or damaged")
    check_index(content, record, vocab_size=manifest.tokenizer.vocab_size, where=where)


def _remove_unfinished_files(cache: Path) -> None:
    """Remove unfinished files of a killed run, which the cache's limit does not count; other files are left alone."""
    temporary_path(cache / MANIFEST_NAME).unlink(missing_ok=True)
    for folder in cache.iterdir():
        if _FOLDER_NAME.fullmatch(folder.name) and not folder.is_symlink():
            for path in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
                path.unlink(missing_ok=True)
