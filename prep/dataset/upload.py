"""Uploads of data sets to object storage: shards first, then the files that describe them, and the manifest last.

Each object is compared with its file after the upload. An object that already exists with the same content is not
uploaded again. Without a manifest, the objects are not taken for a data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from prep.dataset.finished import find_manifest
from prep.dataset.names import REJECTED_NAME, REPORT_FILES, STATISTICS_NAME, belongs_to_data_set
from prep.dataset.verification import verify_hashes
from prep.execution.observer import Observer
from prep.execution.task_store import WorkError
from streaming_rwkv.config import UserError
from streaming_rwkv.location import checked_local, is_remote
from streaming_rwkv.remote_outputs import check_outside_in_store
from streaming_rwkv.shards import (
    INDEX_NAME,
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
)
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.tokenizer import SAVED_FILES

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 8


def unexpected_objects(store: Store) -> list[str]:
    """Return the names of objects that belong to no data set, finished or not."""
    # Programs for browsing buckets create empty objects for folders.
    names = [name for name in store.list() if name and not name.endswith("/")]
    return [name for name in names if name != MANIFEST_NAME and not belongs_to_data_set(name)]


@dataclass(frozen=True, kw_only=True)
class UploadResult:
    """A data set in object storage, and whether it was there before."""

    manifest: Manifest
    was_there: bool


def upload(folder: str | Path, location: str, *, observer: Observer | None = None) -> UploadResult:
    """Copy a finished local data set to object storage, or resume such an upload.

        upload("shards", "s3://bucket/shards")

    Args:
        location: s3://bucket/path, where nothing else is stored.
        observer: receives the progress, in bytes.
    Raises:
        DataError: the local data set is not complete.
        WorkError: the folder holds links or unexpected files, or the location other objects or another data set.
        StorageError: the server fails.
    """
    folder = Path(checked_local(folder, remedy="an upload goes from a folder to s3://bucket/path"))
    observer = observer or Observer()
    if not is_remote(location):
        raise UserError(f"upload {folder} {location}: the target must be s3://bucket/path")
    _check_files(folder)
    manifest = verify_hashes(folder, observer=observer)
    with contextlib.closing(open_store(location)) as store:
        if (there := find_manifest(store)) is not None:
            check_same(there, manifest, where=store.location)
            return UploadResult(manifest=manifest, was_there=True)
        check_free(store)
        with Transfers(store) as transfers:
            for stream in manifest.streams:
                for shard in stream.shards:
                    name = f"{stream.path}/{shard.basename}"
                    transfers.put(folder / name, name, sha256=shard.sha256, size=shard.bytes, source=stream.source)
            transfers.wait(observer)
            publish(folder, manifest, transfers)
    return UploadResult(manifest=manifest, was_there=False)


def _check_files(folder: Path) -> None:
    """Check that a folder holds a data set only: archives and clones keep links, and a link can lead anywhere.

    Hidden files and folders are ignored, since they are never uploaded, and so are the pages that `report` writes.

    Raises:
        WorkError: a link, another file that is not regular, or one that a data set does not have.
    """
    if not (folder / MANIFEST_NAME).exists():
        return  # `verify_hashes` reports that
    unexpected: list[str] = []
    for above, folders, files in os.walk(folder, onerror=_raise_unreadable):
        for name in sorted(name for name in [*folders, *files] if not name.startswith(".")):
            path = Path(above) / name
            within = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            is_known = within in (MANIFEST_NAME, *REPORT_FILES) or belongs_to_data_set(within)
            if not stat.S_ISREG(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
                raise WorkError(f"{path}: is {kind}; an upload sends regular files: remove it, or copy its content")
            if not is_known:
                unexpected.append(within)
        folders[:] = [name for name in folders if not name.startswith(".")]
    if unexpected:
        raise WorkError(
            f"{folder}: holds files that do not belong to a data set ({', '.join(unexpected[:3])}); move them away"
        )


def _raise_unreadable(error: OSError) -> None:
    raise WorkError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def check_free(store: Store) -> None:
    """Check before the work that a data set can be written to a store, and abort uploads that a killed run left.

    Raises:
        UserError: the store holds other objects, or is in another data set or a checkpoint.
        StorageError: there is no such bucket, writing is not allowed, or the server fails.
    """
    if unexpected := unexpected_objects(store):
        raise WorkError(
            f"{store.location}: holds other objects ({', '.join(unexpected[:3])}); choose a location without objects"
        )
    check_outside_in_store(store, what="data set", remedy="choose a location of its own")
    store.check_writable()
    if aborted := store.abort_unfinished():
        logger.info("%s: aborted %d unfinished uploads of an earlier run", store.location, aborted)


def check_same(there: Manifest, ours: Manifest, *, where: str) -> None:
    """Check that two manifests are of the same data.

    Raises:
        WorkError: they have different fingerprints.
    """
    if there.fingerprint != ours.fingerprint:
        raise WorkError(
            f"{where}: holds another data set, with fingerprint {there.fingerprint[:16]}, not {ours.fingerprint[:16]}; "
            "choose another location, or remove it"
        )


class Transfers:
    """Concurrent uploads. The first failure stops the others and is raised by the next call."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="upload")
        self._pending: dict[Future[None], tuple[str, int]] = {}
        self._failure: BaseException | None = None

    def put(self, file: Path, name: str, *, sha256: str, size: int = 0, source: str = "") -> None:
        """Queue `file` for upload; `size` and `source` are for the progress."""
        self._raise_failure()
        future = self._pool.submit(self._put, file, name, sha256)
        self._pending[future] = source, size

    def wait(self, observer: Observer | None = None) -> None:
        """Wait until all queued files are uploaded."""
        observer = observer or Observer()
        left = {future: of for future, of in self._pending.items() if not future.done()}
        totals: Counter[str] = Counter()
        for source, size in left.values():
            totals[source] += size
        if totals.total():
            observer.step("uploading", totals=totals, in_bytes=True)
        for future in as_completed(left):
            self._raise_failure()
            observer.done(*left[future])
        self._raise_failure()
        self._pending.clear()

    def _put(self, file: Path, name: str, sha256: str) -> None:
        if self._failure is None:
            try:
                self.store.put_file(file, name, sha256=sha256)
            except BaseException as error:  # noqa: BLE001  # raised by the next call
                self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Transfers:
        return self

    def __exit__(self, *_: object) -> None:
        self._failure = self._failure or RuntimeError("closed")
        self._pool.shutdown(cancel_futures=True)


def publish(folder: Path, manifest: Manifest, transfers: Transfers) -> None:
    """Upload the files that describe the shards, check that all objects exist, and then upload the manifest.

    Raises:
        DataError: an object is missing or has another size: another program is writing or deleting here.
        WorkError: another data set was finished at this location meanwhile.
        StorageError: the server fails.
    """
    store = transfers.store
    saved = [f"{TOKENIZER_FOLDER}/{name}" for name in SAVED_FILES[manifest.tokenizer.kind]]
    described = [name for name in (*sorted(saved), STATISTICS_NAME, REJECTED_NAME) if (folder / name).exists()]
    expected = {name: (folder / name).stat().st_size for name in described}
    for name in described:
        # The manifest has no hashes of these files. This hash is of a regular file: a link put there later is noticed.
        transfers.put(folder / name, name, sha256=_sha256_of_regular(folder / name))
    transfers.wait()
    for stream in manifest.streams:
        name = f"{stream.path}/{INDEX_NAME}"
        expected[name] = (folder / name).stat().st_size
        transfers.put(folder / name, name, sha256=stream.index_sha256)
        expected |= {f"{stream.path}/{shard.basename}": shard.bytes for shard in stream.shards}
    transfers.wait()
    if (there := find_manifest(store)) is not None:
        check_same(there, manifest, where=store.location)
    _check_objects(store, expected)
    store.put_bytes(manifest.to_json(), MANIFEST_NAME)


def _sha256_of_regular(file: Path) -> str:
    """Return the sha256 of a file, without following a link or waiting for a pipe.

    Raises:
        WorkError: it is not a regular file, or cannot be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:  # ELOOP: a link
        raise WorkError(f"{file}: cannot be read as a regular file ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise WorkError(f"{file}: is not a regular file; remove it, or build again")
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _check_objects(store: Store, expected: Mapping[str, int]) -> None:
    found = store.list()
    for name, size in expected.items():
        if found.get(name) != size:
            state = "is gone" if name not in found else f"has {found[name]:,} bytes, not {size:,}"
            raise DataError(
                f"{store.url(name)}: {state} since it was uploaded; does another program write or delete here? The "
                "manifest was not written; run the same command again"
            )
    # These are of an earlier, unfinished build with other settings: `check_free` has found nothing else here.
    leftovers = [name for name in found if name not in expected and belongs_to_data_set(name)]
    if leftovers:
        logger.info("%s: removing %d objects of an earlier, unfinished build", store.location, len(leftovers))
        store.delete(leftovers)
