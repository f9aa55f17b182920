"""A data set on its way to object storage: shards first, then what describes them, the manifest last of all.

Each object is compared with its file after it went up, and nothing that lies there already goes up again. Until the
manifest is there, nobody takes the rest for a data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from prep.commands.report import REPORT_NAME
from prep.dataset.finished import find_manifest
from prep.dataset.shard_writer import Shard
from prep.dataset.verification import verify_hashes
from prep.execution.observer import Observer
from prep.execution.task_store import WorkError, done_folder
from prep.stages.packing import Window, WindowRecord
from prep.stages.statistics import STATISTICS_NAME
from prep.stages.tokenization import REJECTED_NAME
from streaming_rwkv.config import UserError
from streaming_rwkv.location import checked_local, is_remote
from streaming_rwkv.shards import (
    INDEX_NAME,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    DataError,
    Manifest,
)
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.tokenizer import SAVED_FILES

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 8
_PAGES = tuple(f"{REPORT_NAME}.{ending}" for ending in ("html", "json"))
_OURS = re.compile(
    rf"({'|'.join(SPLITS)})/[^/]+/\d+-\d+/({re.escape(INDEX_NAME)}|shard\.\d+\.mds\.zstd)|"
    rf"{TOKENIZER_FOLDER}/({'|'.join(map(re.escape, sorted(set().union(*SAVED_FILES.values()))))})|"
    rf"{re.escape(STATISTICS_NAME)}|{re.escape(REJECTED_NAME)}"
)


def strangers(store: Store) -> list[str]:
    """Objects that are no part of a data set, or of one that is being built."""
    # Browsers of buckets make empty objects for folders.
    names = [name for name in store.list() if name and not name.endswith("/")]
    return [name for name in names if name != MANIFEST_NAME and not _OURS.fullmatch(name)]


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """A data set that is there, and whether it was before."""

    manifest: Manifest
    was_there: bool


def upload(folder: str | Path, location: str, *, observer: Observer | None = None) -> Uploaded:
    """Copy a finished local data set to `s3://bucket/path`, or go on with that.

    Raises:
        DataError: the local data set is not whole.
        WorkError: the folder holds links or unexpected files; other objects lie there, or another data set.
        StorageError: the server fails.
    """
    folder, observer = (
        Path(checked_local(folder, remedy="an upload goes from a folder to s3://bucket/path")),
        observer or Observer(),
    )
    if not is_remote(location):
        raise UserError(f"upload {folder} {location}: goes from a folder to s3://bucket/path")
    _check_files(folder)
    manifest = verify_hashes(folder, observer=observer)
    with contextlib.closing(open_store(location)) as store:
        if (there := find_manifest(store)) is not None:
            check_same(there, manifest, where=store.location)
            return Uploaded(manifest=manifest, was_there=True)
        check_free(store)
        with Transfers(store) as transfers:
            for stream in manifest.streams:
                for shard in stream.shards:
                    name = f"{stream.path}/{shard.basename}"
                    transfers.put(folder / name, name, sha256=shard.sha256, size=shard.bytes, source=stream.source)
            transfers.wait(observer)
            publish(folder, manifest, transfers)
    return Uploaded(manifest=manifest, was_there=False)


def _check_files(folder: Path) -> None:
    """Refuse a folder with anything in it but a data set: archives and clones keep links, and a link can lead anywhere.

    Hidden files and folders are passed over, since they are never sent; so are the pages that `report` writes.

    Raises:
        WorkError: a link, a file that is no regular one, or one that a data set does not have.
    """
    if not (folder / MANIFEST_NAME).exists():
        return  # no data set, as `verify_hashes` says
    unexpected: list[str] = []
    for above, folders, files in os.walk(folder, onerror=_raise_unreadable):
        for name in sorted(name for name in [*folders, *files] if not name.startswith(".")):
            path = Path(above) / name
            within = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            is_known = within in (MANIFEST_NAME, *_PAGES) or _OURS.fullmatch(within)
            if not stat.S_ISREG(mode):
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
                raise WorkError(f"{path}: is {kind}, and an upload sends regular files; remove it, or copy its content")
            if not is_known:
                unexpected.append(within)
        folders[:] = [name for name in folders if not name.startswith(".")]
    if unexpected:
        raise WorkError(
            f"{folder}: holds files that are no part of a data set ({', '.join(unexpected[:3])}); move them away"
        )


def _raise_unreadable(error: OSError) -> None:
    raise WorkError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def check_free(store: Store) -> None:
    """Find out before the work whether a data set can be written there, and clear what a killed run left.

    Raises:
        WorkError: other objects lie there.
        StorageError: no such bucket, not allowed to write, or the server fails.
    """
    if others := strangers(store):
        raise WorkError(f"{store.location}: holds other objects ({', '.join(others[:3])}); choose an empty place")
    store.check_writable()
    if aborted := store.abort_unfinished():
        logger.info("%s: cleared %d unfinished uploads of an earlier run", store.location, aborted)


def check_same(there: Manifest, ours: Manifest, *, where: str) -> None:
    """Raises WorkError: another data set lies there."""
    if there.fingerprint != ours.fingerprint:
        raise WorkError(
            f"{where}: holds another data set, with fingerprint {there.fingerprint[:16]}, not {ours.fingerprint[:16]}; "
            "choose another place, or remove it"
        )


class Transfers:
    """Files on their way up, some at a time. The first failure stops the others, and is raised by whoever asks next."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._pool = ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="upload")
        self._pending: dict[Future[None], tuple[str, int]] = {}
        self._failure: BaseException | None = None

    def put(self, file: Path, name: str, *, sha256: str, size: int = 0, source: str = "") -> None:
        """Have `file` uploaded; `size` and `source` are for the progress."""
        self._raise_failure()
        future = self._pool.submit(self._put, file, name, sha256)
        self._pending[future] = source, size

    def wait(self, observer: Observer | None = None) -> None:
        """Until all is there."""
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
            except BaseException as error:  # noqa: BLE001  # raised again by the one who waits
                self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Transfers:
        return self

    def __exit__(self, *_: object) -> None:
        self._failure = self._failure or RuntimeError("closed")
        self._pool.shutdown(cancel_futures=True)


class ShardUploads:
    """Sends the shards of packed windows up as soon as their final numbers are known.

    The shards of a stream are counted through its windows, so a window's have to wait for those of the windows before.
    """

    def __init__(self, transfers: Transfers, windows: Sequence[Window], *, work: Path) -> None:
        self._transfers = transfers
        self._windows = windows
        self._work = work
        self._records: dict[int, WindowRecord] = {}
        by_stream = itertools.groupby(range(len(windows)), key=lambda index: windows[index].stream)
        self._waiting = {stream: list(indices)[::-1] for stream, indices in by_stream}
        self._counted: Counter[str] = Counter()

    def packed(self, index: int, record: WindowRecord) -> None:
        """The window of that index is packed."""
        self._records[index] = record
        stream = self._windows[index].stream
        waiting = self._waiting[stream]
        while waiting and waiting[-1] in self._records:
            following = waiting.pop()
            window, shards = self._windows[following], self._records.pop(following).shards
            for file, shard in final_shards(window, shards, first=self._counted[stream], work=self._work):
                name, record_of = f"{stream}/{shard.record.basename}", shard.record
                self._transfers.put(
                    file, name, sha256=record_of.sha256, size=record_of.bytes, source=self._windows[index].source
                )
            self._counted[stream] += len(shards)


def final_shards(window: Window, shards: Sequence[Shard], *, first: int, work: Path) -> Iterator[tuple[Path, Shard]]:
    """Where each shard of a window lies, and the shard under its final name; `first` is the first one's number."""
    folder = done_folder(work, window.name)
    for number, shard in enumerate(shards, start=first):
        yield folder / shard.record.basename, shard.renamed(number)


def publish(folder: Path, manifest: Manifest, transfers: Transfers) -> None:
    """Upload what describes the shards, find out whether all is there, and then upload the manifest.

    Raises:
        DataError: an object is gone, or has another size: someone else is writing or deleting here.
        WorkError: another data set was finished there meanwhile.
        StorageError: the server fails.
    """
    store = transfers.store
    saved = [f"{TOKENIZER_FOLDER}/{name}" for name in SAVED_FILES[manifest.tokenizer.kind]]
    described = [name for name in (*sorted(saved), STATISTICS_NAME, REJECTED_NAME) if (folder / name).exists()]
    expected = {name: (folder / name).stat().st_size for name in described}
    for name in described:
        # No manifest has their hashes: the upload compares what it reads with what was read here, which is no link's.
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
    _check_there(store, expected)
    store.put_bytes(manifest.to_json(), MANIFEST_NAME)


def _sha256_of_regular(file: Path) -> str:
    """The sha256 of a file, without following a link or waiting for a pipe.

    Raises:
        WorkError: no regular file, or it cannot be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:  # ELOOP: a link
        raise WorkError(f"{file}: cannot be read as a regular file ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise WorkError(f"{file}: is no regular file; remove it, or build again")
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _check_there(store: Store, expected: Mapping[str, int]) -> None:
    found = store.list()
    for name, size in expected.items():
        if found.get(name) != size:
            state = "is gone" if name not in found else f"has {found[name]:,} bytes, not {size:,}"
            raise DataError(
                f"{store.url(name)}: {state} since it was uploaded; does another program write or delete here? The "
                "manifest was not written; run the same command again"
            )
    # Of an earlier build with other settings that was never finished: `check_free` saw that nothing else is here.
    leftovers = [name for name in found if name not in expected and _OURS.fullmatch(name)]
    if leftovers:
        logger.info("%s: removing %d objects of an earlier, unfinished build", store.location, len(leftovers))
        store.delete(leftovers)
