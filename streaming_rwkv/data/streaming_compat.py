"""Overrides of mosaicml-streaming 0.13.0, and every private name of it that this package uses.

    override                              reason
    Stream._prepare_shard_part            shards are compared with their hashes in the cache too; Streaming would keep
                                          and use a file that was damaged there. Its S3 client has no deadline.
    StreamingDataset.prepare_shard        a shard that failed becomes 'remote' again; Streaming leaves it 'preparing',
                                          and other workers wait for it indefinitely. None of its method is called:
                                          the state may change before it looks again. Room in the cache is made before
                                          and after a shard is fetched; Streaming makes it before only, so that
                                          processes that fetch at the same time exceed the limit together.
    StreamingDataset.get_item             a shard that was in the cache before this run is verified first.
    StreamingDataset.{state_dict,load_state_dict}
                                          the order is a function of the step: there is nothing to save.
    the cache's lock file                 in the cache; Streaming's is in the folder for temporary files, where each
                                          run would leave one.
    SharedMemory                          its pages are allocated when it is made: where /dev/shm is full, Streaming's
                                          first write is SIGBUS. It is closed with the dataset: Streaming keeps it, and
                                          that of other datasets which it met, until the process ends.
    get_shm_prefix                        the names of shared memory begin with a number of the cache, which one run
                                          uses at a time. Streaming takes the first number of which no name exists:
                                          runs that start at the same time take the same one, and so does a run that
                                          starts while another ends, whose arrays it would then write to.
    World.detect, maybe_init_dist, dist   a process that reads on its own is a world of one: Streaming takes the ranks
                                          from the launcher's environment, and waits for all of them.

tests/data/test_streaming_compat.py has a test for each.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import streaming
from filelock import FileLock
from streaming import Stream, StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import LOCALS, SHM_TO_CLEAN, TICK
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo
from streaming.base.shared import SharedArray, SharedMemory, array, prefix
from streaming.base.storage.download import CloudDownloader
from streaming.base.world import World

from streaming_rwkv.config import UserError
from streaming_rwkv.data.setting_names import RUN_SETTINGS, SettingNames
from streaming_rwkv.distributed import barrier
from streaming_rwkv.filesystem import atomic_file, has_flock, is_disk_full, read_regular_file
from streaming_rwkv.limits import limit_of
from streaming_rwkv.mds import Counts, check_shard, check_totals, expand
from streaming_rwkv.shards import DataError, Manifest, StreamRecord, sha256_of_file
from streaming_rwkv.storage import StorageError, Store
from streaming_rwkv.version import PROGRAM

logger = logging.getLogger(__name__)

SUPPORTED_VERSION = "0.13.0"
VERIFIED = "verified"  # name of the shared array that says which shards were compared with their hashes and checked
COUNTS = "counts"  # name of the shared array of what the checked shards hold
_LARGEST_LOCALS_BYTES = 1 << 26


def check_version(found: str) -> None:
    """Refuse a version of Streaming whose internals these overrides were not written for.

    Raises:
        UserError: it is not the supported version.
    """
    if found != SUPPORTED_VERSION:
        raise UserError(
            f"mosaicml-streaming: found version {found}, but streaming_rwkv overrides internals of "
            f"{SUPPORTED_VERSION}; pip install mosaicml-streaming=={SUPPORTED_VERSION}"
        )


check_version(streaming.__version__)


def _unwritable(path: Path, error: BaseException) -> DataError:
    otherwise = "make space on its disk" if is_disk_full(error) else "check the disk and its mount"
    return DataError(f"{path}: cannot be written ({error}); {limit_of(error) or otherwise}")


class VerifiedStream(Stream):
    """A stream whose shards are compared with their hashes, in the download and in the cache."""

    def __init__(self, store: Store | None, *, record: StreamRecord, manifest: Manifest, **options: Any) -> None:
        """Create the stream of one folder.

        Args:
            store: of a data set in object storage; its requests have deadlines.
            record: the stream, in its data set's `manifest`.
            options: of Streaming's `Stream`.
        """
        super().__init__(**options)
        self.store = store
        self.record = record
        self.manifest = manifest

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Put the verified raw file into the cache; return the change in bytes of the cache."""
        assert zip_info is not None
        raw = Path(self.local, self.split, raw_info.basename)
        delta = self.drop_if_bad(raw_info)
        if raw.exists():
            return delta
        data, left_over = self._fetch_compressed(zip_info)
        delta -= left_over
        # The size that the frame claims is not trusted: at most the bytes that the manifest allows are produced.
        plain = expand(data, raw_info.bytes)
        if plain is None:
            raise DataError(
                f"{self._url(zip_info)}: does not expand to the {raw_info.bytes} bytes that the index gives"
            )
        if hashlib.sha256(plain).hexdigest() != raw_info.hashes["sha256"]:
            raise DataError(f"{self._url(zip_info)}: its decompressed bytes do not have the hash that the index gives")
        try:
            with atomic_file(raw) as temporary:
                temporary.write_bytes(plain)
        except OSError as error:
            raise _unwritable(raw, error) from error
        return delta + raw_info.bytes

    def _fetch_compressed(self, info: FileInfo) -> tuple[bytes, int]:
        """Return a shard as it is stored, verified, and the bytes that were removed from the cache for it."""
        path = Path(self.local, self.split, info.basename)
        left_over = path.stat().st_size if path.exists() else 0
        try:
            if self.store is None:
                return self._copy_from_folder(path, info), left_over
            name, sha256 = f"{self.record.path}/{info.basename}", info.hashes["sha256"]
            return self.store.get_bytes(name, most=info.bytes, sha256=sha256), left_over
        except DataError:
            raise
        except StorageError as error:
            raise DataError(str(error)) from error
        except Exception as error:
            if is_disk_full(error):
                raise _unwritable(path, error) from error
            remedy = "restore it, or check the disk and the mount that it is on"
            raise DataError(f"{self._url(info)}: cannot be fetched ({error}); {remedy}") from error
        finally:
            path.unlink(missing_ok=True)

    def _copy_from_folder(self, path: Path, info: FileInfo) -> bytes:
        """Read a shard through `path` in the cache, where a killed run may have left a copy of it."""
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
            f"rebuild the data set with `{PROGRAM} prepare`"
        )

    def drop_if_bad(self, raw_info: FileInfo) -> int:
        """Remove the cached raw file unless it has its size and hash; return the change in bytes of the cache."""
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

    def check(self, shard: int) -> Counts | None:
        """Check every pack of a raw file in the cache, and return the counts; None if the file is not there.

        Raises:
            DataError: a pack breaks the contract.
        """
        record = self.record.shards[shard]
        try:
            raw = Path(self.local, self.split, record.basename.removesuffix(".zstd")).read_bytes()
        except FileNotFoundError:
            return None
        return check_shard(raw, record, self.record, self.manifest, where=f"{self.remote}/{record.basename}")

    def _url(self, info: FileInfo) -> str:
        return f"{self.remote}/{info.basename}"


class VerifiedDataset(StreamingDataset):
    """Samples by their number in all streams, from shards that are verified, with shared memory that can be closed."""

    def __init__(
        self,
        streams: list[VerifiedStream],
        *,
        lock: Path,
        cache_limit: str | int | None,
        fetch_ahead: int,
        batch: int,
        as_rank: tuple[int, int] | None = None,
        names: SettingNames = RUN_SETTINGS,
    ) -> None:
        """Open the streams, and record the shared memory that Streaming creates for them.

        Args:
            lock: file by which processes take turns at the cache; elsewhere if its file system has no `flock`.
            as_rank: the rank and the number of ranks of a process that reads on its own, with a cache of its own. By
                default they are the launcher's: its ranks open the data together, and share the cache of their node.
            names: of the settings, for errors.
        """
        alone = as_rank is not None
        take_prefix = _take_prefix(_shared_memory_number(lock), alone=alone)
        with (
            _recorded_shared_memory() as opened,
            _replaced(streaming_dataset, "get_shm_prefix", take_prefix),
            _one_process() if alone else nullcontext(),
        ):
            super().__init__(
                streams=streams,
                cache_limit=cache_limit,
                predownload=fetch_ahead,
                # Not used by our iteration, but set, so that no default of Streaming's can decide anything.
                batch_size=batch,
                num_canonical_nodes=1,
                shuffle=False,
                batching_method="random",
            )
            name = prefix._get_path(self._shm_prefix_int, VERIFIED)
            self._verified = SharedArray(self.num_shards, np.uint8, name)
            name = prefix._get_path(self._shm_prefix_int, COUNTS)
            self._counts = SharedArray((self.num_shards, len(vars(Counts()))), np.int64, name)
        ours = prefix._get_path(self._shm_prefix_int, "")
        self._shared_memory = [memory for memory in opened if memory.shm.name.startswith(ours)]
        _close_shared_memory([memory for memory in opened if memory not in self._shared_memory])
        world = self._unique_rank_world
        self.rank: int
        self.num_ranks: int
        self.rank, self.num_ranks = as_rank or (world.rank, world.num_ranks)
        self._cache_filelock_path = str(_lock_path(lock, names))
        if self._unique_rank_world.is_local_leader:
            self._verified[:] = 0
            self._counts[:] = 0

    def close(self) -> None:
        """Close the shared memory; nothing can be read afterwards. The cache's lock is the shard set's."""
        self.__del__()
        _close_shared_memory(self._shared_memory)
        self._shared_memory = []

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        raise NotImplementedError("the order is a function of the step; a run resumes by starting at a step")

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        raise NotImplementedError("the order is a function of the step; a run resumes by starting at a step")

    def worker(self) -> tuple[int, int]:
        """Return this process's number among the rank's loader workers, and how many there are."""
        world = self._unique_rank_world.detect_workers()
        return world.worker_of_rank, world.workers_per_rank

    def shard_of(self, sample_id: int) -> int:
        """Return the shard that holds a sample."""
        return int(self.spanner[sample_id][0])

    def is_local(self, shard: int) -> bool:
        """Return True for a shard that is in the cache."""
        return bool(self._shard_states[shard] == _ShardState.LOCAL)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and verify a shard, or wait for the process that fetches it; after a failure its state is 'remote'."""
        with FileLock(self._cache_filelock_path):
            state = self._shard_states[shard_id]
            ours = state == _ShardState.REMOTE or (state == _ShardState.LOCAL and not self._raw_file(shard_id).exists())
            if ours:
                self._shard_states[shard_id] = _ShardState.REMOTE  # also if making room fails
                self._make_room(self.shards[shard_id].get_max_size())
                self._shard_states[shard_id] = _ShardState.PREPARING
            self._shard_access_times[shard_id] = time.time_ns()
        if ours:
            self._fetch(shard_id)
        while blocking and self._shard_states[shard_id] == _ShardState.PREPARING:
            time.sleep(TICK)
        if self._shard_states[shard_id] == _ShardState.LOCAL and not self._verified[shard_id]:
            self._verify(shard_id)

    def _raw_file(self, shard: int) -> Path:
        stream = self.streams[self.stream_per_shard[shard]]
        return Path(stream.local, stream.split, self.shards[shard].raw_data.basename)

    def _fetch(self, shard: int) -> None:
        """Put a shard into the cache that this process has marked as 'preparing'."""
        try:
            change = self.streams[self.stream_per_shard[shard]].prepare_shard(self.shards[shard])
        except BaseException:
            self._shard_states[shard] = _ShardState.REMOTE
            raise
        with FileLock(self._cache_filelock_path):
            self.cache_usage += change
            # Before the shard can be read: the process that waits for it may be the last one, and end.
            self._make_room(0)
            self._shard_access_times[shard] = time.time_ns()
            self._shard_states[shard] = _ShardState.LOCAL

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards until `size` more bytes are within the limit, or none is left.

        The caller holds the cache's lock.
        """
        while self.cache_limit and self.cache_usage + size > self.cache_limit:
            if not (self._shard_states.numpy() == _ShardState.LOCAL).any():
                return  # the rest is being fetched by other processes
            self._evict_coldest_shard()

    def _verify(self, shard: int) -> None:
        """Compare a shard in the cache with its hash, and check its packs, once on this node."""
        with FileLock(self._cache_filelock_path):
            if self._verified[shard]:
                return
            number = int(self.stream_per_shard[shard])
            stream = self.streams[number]
            assert isinstance(stream, VerifiedStream)
            change = stream.drop_if_bad(self.shards[shard].raw_data)
            if change:
                self.cache_usage += change
                self._shard_states[shard] = _ShardState.REMOTE
                return
            counts = stream.check(shard - int(self.shard_offset_per_stream[number]))
            if counts is not None:
                self._counts[shard] = list(vars(counts).values())
                self._check_totals(number, last=shard)  # before: an error must come again when a pack is read
                self._verified[shard] = 1

    def _check_totals(self, stream: int, *, last: int) -> None:
        """Compare a stream with its record when all of its shards but the `last` had been checked.

        Raises:
            DataError: its shards do not hold what the record says.
        """
        first = int(self.shard_offset_per_stream[stream])
        shards = slice(first, first + int(self.shards_per_stream[stream]))
        if self._verified.numpy()[shards].sum() + 1 == self.shards_per_stream[stream]:
            found = Counts(**dict(zip(vars(Counts()), self._counts.numpy()[shards].sum(0).tolist(), strict=True)))
            checked = self.streams[stream]
            assert isinstance(checked, VerifiedStream)
            check_totals(found, checked.record, where=str(checked.remote))

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a sample from a verified shard."""
        shard = self.shard_of(sample_id)
        if not self._verified[shard]:
            self.prepare_shard(shard)
        return super().get_item(sample_id, retry)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module another attribute until the block ends."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _lock_path(path: Path, names: SettingNames) -> Path:
    """Return `path`, or a file outside the cache if the cache's file system has no `flock`, which Streaming needs.

    Raises:
        UserError: neither the cache nor the folder for temporary files has `flock`.
    """
    if has_flock(path.parent):
        return path
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if folder.is_dir() and os.access(folder, os.W_OK) and has_flock(folder):
            name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
            return folder / f"streaming-rwkv-{os.geteuid()}-{name}.lock"
    raise UserError(
        f"{path.parent}: loader processes share this data cache, but its file system has no locks (flock), and neither "
        f"has that of {tempfile.gettempdir()}; set `{names.cache}` or TMPDIR to a folder on a local disk"
    )


@contextmanager
def _recorded_shared_memory() -> Iterator[list[SharedMemory]]:
    """Yield the list of all shared memory that Streaming opens in the block; Streaming itself exposes only part of it.

    Raises:
        UserError: /dev/shm has no room for it.
    """
    opened: list[SharedMemory] = []

    class Recorded(SharedMemory):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(*args, **kwargs)
                opened.append(self)
                if self.created_shms:
                    _reserve(self)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                _close_shared_memory(opened)
                raise _no_shared_memory(error) from None

    with _replaced(prefix, "SharedMemory", Recorded), _replaced(array, "SharedMemory", Recorded):
        yield opened


def _reserve(memory: SharedMemory) -> None:
    """Allocate the pages of new shared memory before anything is written to them.

    It is made as a file with a hole. Where /dev/shm is full, the first write into the hole is SIGBUS.
    """
    descriptor = memory.shm._fd  # the standard library gives no other way to it
    if hasattr(os, "posix_fallocate") and descriptor >= 0:
        os.posix_fallocate(descriptor, 0, memory.shm.size)


def _no_shared_memory(error: OSError) -> UserError:
    free = ""
    with suppress(OSError):
        status = os.statvfs("/dev/shm")
        free = f", {status.f_bavail * status.f_frsize:,} of {status.f_blocks * status.f_frsize:,} bytes are free"
    return UserError(
        f"/dev/shm: no room for the shared memory of the data loader ({error.strerror}{free}); remove what other "
        "programs left there, or make it larger (docker run --shm-size=1g; mount -o remount,size=1g /dev/shm)"
    )


def _shared_memory_number(lock: Path) -> int:
    """Return the number of a cache's shared memory, which no other cache of this machine has, in a container or not."""
    status = lock.parent.stat()
    place = f"{os.path.realpath(lock)}\0{status.st_dev}\0{status.st_ino}"
    return int.from_bytes(hashlib.sha256(os.fsencode(place)).digest()[:6], "little")


def _take_prefix(number: int, *, alone: bool) -> Callable[..., tuple[int, SharedMemory]]:
    """Return what replaces Streaming's `get_shm_prefix`: local rank 0 makes the first array, the others open it.

    Args:
        alone: do not wait for other ranks.
    """

    def take(
        streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 0
    ) -> tuple[int, SharedMemory]:
        name = prefix._get_path(number, LOCALS)
        if world.is_local_leader:
            _remove_shared_memory(prefix._get_path(number, ""))  # that a killed run left
            content = prefix._pack_locals(streams_local, number)
            memory: SharedMemory = prefix.SharedMemory(name, True, len(content))
            memory.buf[: len(content)] = content
        if not alone:
            barrier()
        return number, memory if world.is_local_leader else prefix.SharedMemory(name, False)

    return take


class _OneProcess(World):
    """A world of this process alone, whatever the launcher's environment says."""

    @classmethod
    def detect(cls) -> World:
        return World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)


class _NoProcessGroup:
    """torch.distributed, as Streaming sees it in a process that reads on its own."""

    @staticmethod
    def is_available() -> bool:
        return False


@contextmanager
def _one_process() -> Iterator[None]:
    """Have Streaming neither look for other ranks nor wait for them until the block ends."""
    with (
        _replaced(streaming_dataset, "World", _OneProcess),
        _replaced(streaming_dataset, "maybe_init_dist", lambda: False),
        _replaced(streaming_dataset, "dist", _NoProcessGroup),
    ):
        yield


def _close_shared_memory(opened: list[SharedMemory]) -> None:
    for memory in opened:
        atexit.unregister(memory.cleanup)
        memory.cleanup()


def remove_stale_shared_memory(cache: Path) -> None:
    """Remove Streaming's shared memory that names `cache`, whose lock this process holds.

    A killed run leaves it behind, and Streaming then refuses the folder ('Reused local directory'). The run that made
    it has ended, since the lock is ours. Shared memory of other caches is left alone.
    """
    for path in Path("/dev/shm").glob(f"*_{LOCALS}"):
        try:  # a pipe or folder of another user's program may have such a name
            names = read_regular_file(path, most=_LARGEST_LOCALS_BYTES, follow=False).split(b"\0")
        except (OSError, UserError):
            continue
        if not any(os.fsencode(cache) + b"/" in name for name in names):
            continue
        _remove_shared_memory(path.name.removesuffix(LOCALS))


def _remove_shared_memory(start: str) -> None:
    """Remove the shared memory of a data set whose names begin with `start`."""
    for name in [*SHM_TO_CLEAN, VERIFIED, COUNTS]:
        Path(f"/dev/shm/{start}{name}").unlink(missing_ok=True)


def copy_file(source: str, target: Path, *, timeout_seconds: float) -> None:
    """Copy a file of a local data set with Streaming's downloader, as its streams do."""
    CloudDownloader.get(None).download(source, str(target), timeout_seconds)
