"""Finished data sets, in a folder or in object storage, as `verify`, `inspect` and `report` read them."""

from __future__ import annotations

import contextlib
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from streaming_rwkv.location import checked_location, is_remote
from streaming_rwkv.shards import (
    LARGEST_FILE_BYTES,
    LARGEST_SHARD_BYTES,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
    parse_manifest,
    read_manifest,
    sha256_of_file,
)
from streaming_rwkv.storage import ObjectMissing, Store, open_store
from streaming_rwkv.tokenizer import SAVED_FILES, Tokenizer, load_tokenizer_of
from streaming_rwkv.version import PROGRAM

_FETCHED_AHEAD = 8


class FileMissing(DataError):
    """A file of a data set that does not exist."""


class DataSet(Protocol):
    """A finished data set, whose files are compared with their hashes before they are read."""

    @property
    def location(self) -> str: ...

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            DataError: there is none, or it is not valid.
        """

    def tokenizer(self, manifest: Manifest) -> Tokenizer: ...

    def files(self, wanted: Iterable[tuple[str, str | None]]) -> Iterator[Path]:
        """Yield the files of `wanted`, (name, sha256), one after another; each exists until the next is requested.

        Raises:
            DataError: a file is missing or has another hash.
            StorageError: an object has another hash, or the server fails.
        """


@contextlib.contextmanager
def open_data_set(location: str | Path) -> Iterator[DataSet]:
    """Open the data set at `location`."""
    location = checked_location(location)
    if not is_remote(location):
        yield LocalDataSet(location=location)
        return
    store = open_store(location)
    with contextlib.closing(store), tempfile.TemporaryDirectory(prefix="prep-") as folder:
        yield RemoteDataSet(store=store, folder=Path(folder))


def find_manifest(store: Store) -> Manifest | None:
    """Return the manifest of the data set in a store, or None if there is no finished one."""
    try:
        content = store.get_bytes(MANIFEST_NAME, most=LARGEST_FILE_BYTES)
    except ObjectMissing:
        return None
    return parse_manifest(content, where=store.url(MANIFEST_NAME))


def find_local_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of the data set in a folder, or None if there is no finished one."""
    return read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None


@dataclass(frozen=True, kw_only=True)
class LocalDataSet:
    """A data set in a folder."""

    location: str

    def manifest(self) -> Manifest:
        return read_manifest(self.location)

    def tokenizer(self, manifest: Manifest) -> Tokenizer:
        return load_tokenizer_of(manifest, Path(self.location) / TOKENIZER_FOLDER)

    def files(self, wanted: Iterable[tuple[str, str | None]]) -> Iterator[Path]:
        for name, sha256 in wanted:
            file = Path(self.location) / name
            check_file(file, sha256)
            yield file


def check_file(file: Path, sha256: str | None) -> None:
    """Compare a file with its hash.

    Raises:
        FileMissing: there is none.
        DataError: it is not a regular file, or has another hash.
    """
    if not file.exists():
        raise FileMissing(f"{file}: missing; the manifest names it: restore it, or build again")
    if not file.is_file():
        raise DataError(f"{file}: not a regular file; restore it, or build again")
    if (size := file.stat().st_size) >= LARGEST_SHARD_BYTES:  # hashing a sparse file may take days
        raise DataError(f"{file}: found {size:,} bytes, expected less than {LARGEST_SHARD_BYTES:,}; restore it")
    if sha256 is not None and (found := sha256_of_file(file)) != sha256:
        raise DataError(f"{file}: sha256 {found}, the manifest says {sha256}; restore it, or build again")


@dataclass(frozen=True, kw_only=True)
class RemoteDataSet:
    """A data set in object storage; `folder` holds the few files that are being read."""

    store: Store
    folder: Path

    @property
    def location(self) -> str:
        return self.store.location

    def manifest(self) -> Manifest:
        manifest = find_manifest(self.store)
        if manifest is None:
            raise DataError(
                f"{self.store.url(MANIFEST_NAME)}: no manifest, so no finished data set here; build it with "
                f"`{PROGRAM} prepare`, or run the same command again if it was interrupted"
            )
        return manifest

    def tokenizer(self, manifest: Manifest) -> Tokenizer:
        folder = self.folder / TOKENIZER_FOLDER
        folder.mkdir(exist_ok=True)
        for name in SAVED_FILES[manifest.tokenizer.kind]:
            self.store.get_file(f"{TOKENIZER_FOLDER}/{name}", folder / name, most=LARGEST_FILE_BYTES)
        return load_tokenizer_of(manifest, folder, where=self.store.url(TOKENIZER_FOLDER))

    def files(self, wanted: Iterable[tuple[str, str | None]]) -> Iterator[Path]:
        """Yield the files, fetching some of them ahead."""
        coming: deque[Future[Path]] = deque()
        with ThreadPoolExecutor(_FETCHED_AHEAD) as pool:
            try:
                for number, (name, sha256) in enumerate(wanted):
                    coming.append(pool.submit(self._fetch, name, sha256, self.folder / f"{number}"))
                    if len(coming) > _FETCHED_AHEAD:
                        yield from _then_removed(coming.popleft())
                while coming:
                    yield from _then_removed(coming.popleft())
            finally:
                pool.shutdown(cancel_futures=True)
                for left in coming:
                    if not left.cancelled() and left.exception() is None:
                        left.result().unlink()

    def _fetch(self, name: str, sha256: str | None, file: Path) -> Path:
        try:
            self.store.get_file(name, file, most=LARGEST_SHARD_BYTES, sha256=sha256)
        except ObjectMissing:
            raise FileMissing(
                f"{self.store.url(name)}: missing; the manifest names it: restore it, or build again"
            ) from None
        return file


def _then_removed(file: Future[Path]) -> Iterator[Path]:
    path = file.result()
    try:
        yield path
    finally:
        path.unlink()
