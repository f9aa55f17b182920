"""Packs of this rank's and this worker's steps, on top of StreamingDataset's shards, cache and readers.

What is replaced, and why (mosaicml-streaming 0.13.0, pinned in pyproject):
- the order: from a pure function of the step (`mixture.Plan`) instead of an epoch's permutation in shared memory;
- the iteration: Streaming's ends silently, or hangs, when a shard cannot be prepared; ours fetches ahead on a best
  effort, and whoever needs the shard raises;
- failures: a shard that fails goes back to 'remote', so that no other worker waits for it for ever;
- lock files: in the cache, not in the temporary folder, where each run would leave some;
- shared memory: closed when the data set is. Streaming's stays until the process ends, and looking for a free name it
  keeps open what it meets of all other data sets on the machine: files that add up to the limit of a process;
- the name of that shared memory: Streaming takes the first free one, and of runs that start at the same time on one
  machine all but one fail; ours wait for each other.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import logging
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from composer.core import DataSpec
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.dataset import _ShardState
from streaming.base.shared import SharedArray, SharedMemory, array, prefix
from streaming.base.world import World
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from streaming_rwkv.config import UserError
from streaming_rwkv.data.batch import Batch, blank_pack, count_packs, count_tokens, finish, join, split_batch
from streaming_rwkv.data.mixture import Plan
from streaming_rwkv.data.order import Ints
from streaming_rwkv.data.shard_set import VERIFIED, ShardSet, VerifiedStream
from streaming_rwkv.distributed import barrier
from streaming_rwkv.filesystem import has_flock, wait_for_lock
from streaming_rwkv.processes import die_with_parent
from streaming_rwkv.shards import DataError, StreamRecord, check_pack, token_dtype

logger = logging.getLogger(__name__)

Batches = Callable[[int, int], Ints]  # (start, stop) → (stop - start, batch_packs) ids of packs, -1 for a blank one
CHUNK_SLOTS = 1 << 15  # slots of the plan that are worked out at a time: some ten milliseconds
FETCH_THREADS = 4
PATIENCE = 3  # timeouts for a batch: a shard that fails ahead of its time, then when it is needed, takes 2.5
START_SECONDS = 30


class PackDataset(StreamingDataset):
    """The packs of `batches` that are this rank's and this worker's, in order."""

    def __init__(
        self,
        shard_set: ShardSet,
        records: list[StreamRecord],
        *,
        batches: Batches,
        num_batches: int,
        batch_packs: int,
        fetch_ahead: int,
        cache_limit: str | int | None,
        download_attempts: int,
        timeout_seconds: float,
    ) -> None:
        with _recorded_shared_memory() as opened, patch.object(streaming_dataset, "get_shm_prefix", _take_name):
            super().__init__(
                streams=shard_set.streams(
                    records, download_attempts=download_attempts, timeout_seconds=timeout_seconds
                ),
                cache_limit=cache_limit,
                predownload=fetch_ahead,
                # Not used by our iteration, but set, so that no default of Streaming's can decide anything.
                batch_size=batch_packs,
                num_canonical_nodes=1,
                shuffle=False,
                batching_method="random",
            )
            name = prefix._get_path(self._shm_prefix_int, VERIFIED)
            self._verified = SharedArray(self.num_shards, np.uint8, name)
        ours = prefix._get_path(self._shm_prefix_int, "")
        self._shared_memory = [memory for memory in opened if memory.shm.name.startswith(ours)]
        _close_shared_memory([memory for memory in opened if memory not in self._shared_memory])
        self.location = shard_set.location
        self.records = records
        self.manifest = shard_set.manifest
        self.batches = batches
        self.num_batches = num_batches
        self.batch_packs = batch_packs
        self.first_batch = 0
        self.rank, self.num_ranks = self._unique_rank_world.rank, self._unique_rank_world.num_ranks
        if batch_packs % self.num_ranks:
            raise ValueError(f"{batch_packs} packs do not divide among {self.num_ranks} ranks")
        self._first_pack = self.sample_offset_per_stream
        self._cache_filelock_path = str(_lock_path(shard_set.cache / f".{records[0].split}.lock"))
        if self._unique_rank_world.is_local_leader:
            self._verified[:] = 0
        self._blank = blank_pack(self.manifest.tokenizer.bos_id, token_dtype(self.manifest.tokenizer.vocab_size))

    def __len__(self) -> int:
        """Packs for this rank in the whole run."""
        return self.num_batches * self.batch_packs // self.num_ranks

    def close(self) -> None:
        """Give up the shared memory; nothing can be read afterwards. The cache's lock is the shard set's."""
        self.__del__()
        _close_shared_memory(self._shared_memory)
        self._shared_memory = []

    def start_at(self, batch: int) -> None:
        """The next iteration begins with this batch."""
        self.first_batch = batch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        raise NotImplementedError("the order is a function of the step; `start_at` is all there is to resume")

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        raise NotImplementedError("the order is a function of the step; `start_at` is all there is to resume")

    def _ids(self) -> Iterator[int]:
        world = self._unique_rank_world.detect_workers()
        return share_of_batches(
            self.batches,
            start=self.first_batch,
            stop=self.num_batches,
            batch_packs=self.batch_packs,
            rank=self.rank,
            ranks=self.num_ranks,
            worker=world.worker_of_rank,
            workers=world.workers_per_rank,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ids = self._ids()
        window: deque[int] = deque()
        in_window: Counter[int] = Counter()
        with ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch") as executor:
            try:
                for pack in ids:
                    window.append(pack)
                    if pack >= 0:
                        shard = int(self.spanner[pack][0])
                        in_window[shard] += 1
                        if in_window[shard] == 1:
                            executor.submit(self._fetch_ahead, shard)
                    if len(window) > self.predownload:
                        yield self._next(window, in_window)
                while window:
                    yield self._next(window, in_window)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    def _next(self, window: deque[int], in_window: Counter[int]) -> dict[str, Any]:
        pack = window.popleft()
        if pack < 0:
            return self._blank
        shard = int(self.spanner[pack][0])
        in_window[shard] -= 1
        if not in_window[shard]:
            del in_window[shard]
        return self[pack]

    def _fetch_ahead(self, shard: int) -> None:
        if self._shard_states[shard] == _ShardState.LOCAL:
            return
        try:
            self.prepare_shard(shard, blocking=False)
        except Exception as error:  # noqa: BLE001 - whoever needs the shard tries again, and raises
            logger.debug("fetching ahead failed: %s", error)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As Streaming's, but a failure is not left behind as 'in preparation', for which others would wait."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise
        if self._shard_states[shard_id] == _ShardState.LOCAL and not self._verified[shard_id]:
            self._verify(shard_id)

    def _verify(self, shard: int) -> None:
        """Compare a shard that lay in the cache before this run with its hash, once on this node."""
        with FileLock(self._cache_filelock_path):
            if self._verified[shard]:
                return
            stream = self.streams[self.stream_per_shard[shard]]
            assert isinstance(stream, VerifiedStream)
            change = stream.drop_if_bad(self.shards[shard].raw_data)
            if change:
                self.cache_usage += change
                self._shard_states[shard] = _ShardState.REMOTE
            else:
                self._verified[shard] = 1

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """A pack by its global id, checked against the contract."""
        shard = int(self.spanner[sample_id][0])
        if not self._verified[shard]:
            self.prepare_shard(shard)
        sample = super().get_item(sample_id, retry)
        stream = int(np.searchsorted(self._first_pack, sample_id, side="right")) - 1
        check_pack(
            sample,
            pack_tokens=self.manifest.pack_tokens,
            vocab_size=self.manifest.tokenizer.vocab_size,
            where=f"{self.streams[stream].remote}, pack {sample_id - int(self._first_pack[stream])}",
        )
        sample["stream"] = stream
        return sample


def _lock_path(path: Path) -> Path:
    """`path`, or a file outside the cache where the cache's file system has no `flock`: Streaming needs one.

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
        f"has that of {tempfile.gettempdir()}; set `data.cache` or TMPDIR to a folder on a local disk"
    )


@contextmanager
def _recorded_shared_memory() -> Iterator[list[SharedMemory]]:
    """Whatever shared memory Streaming opens meanwhile; it hands out only a part of it."""
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

    with patch.object(prefix, "SharedMemory", Recorded), patch.object(array, "SharedMemory", Recorded):
        yield opened


def _reserve(memory: SharedMemory) -> None:
    """Have the pages of new shared memory allocated before anything is written to them.

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


def _take_name(*arguments: Any, **options: Any) -> tuple[int, SharedMemory]:
    """Streaming's `get_shm_prefix`: every rank looks for a free name, then the node's first one takes it. Meanwhile no
    other run may take it."""
    world: World = arguments[2]
    shared_memory = Path("/dev/shm")
    names = shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())  # the folder that holds them
    lock = wait_for_lock(names, timeout_seconds=START_SECONDS) if world.is_local_leader else nullcontext()
    with lock:
        barrier()
        return prefix.get_shm_prefix(*arguments, **options)


def _close_shared_memory(opened: list[SharedMemory]) -> None:
    for memory in opened:
        atexit.unregister(memory.cleanup)
        memory.cleanup()


def share_of_batches(
    batches: Batches, *, start: int, stop: int, batch_packs: int, rank: int, ranks: int, worker: int, workers: int
) -> Iterator[int]:
    """The packs that one worker of one rank reads for batches start … stop - 1.

    Each rank has its part of every batch; DataLoader takes a rank's n-th batch from worker n modulo workers.
    """
    per_rank = batch_packs // ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    chunk = max(1, CHUNK_SLOTS // batch_packs)
    for chunk_start in range(start, stop, chunk):
        chunk_stop = min(chunk_start + chunk, stop)
        first = (worker - (chunk_start - start)) % workers
        yield from batches(chunk_start, chunk_stop)[first::workers, mine].ravel().tolist()


def evaluation_batches(packs: list[int], *, batch_packs: int, per_stream: int | None = None) -> tuple[Batches, int]:
    """Every pack of every stream once (or its first `per_stream`), in order; blank packs fill up the last batch."""
    first = np.cumsum([0, *packs])
    chosen = [first[i] + np.arange(min(n, per_stream or n)) for i, n in enumerate(packs)]
    ids = np.concatenate(chosen).astype(np.int64)
    num_batches = -(-len(ids) // batch_packs)
    table = np.pad(ids, (0, num_batches * batch_packs - len(ids)), constant_values=-1).reshape(-1, batch_packs)
    return lambda start, stop: table[start:stop], num_batches


def training_batches(plan: Plan) -> tuple[Batches, int]:
    return plan.packs, plan.steps


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    """torch's, which raises another error in its destructor where a worker could not be started."""

    def __del__(self) -> None:
        if hasattr(self, "_workers_status"):  # set once all have been started
            super().__del__()


class PackLoader(DataLoader[Any]):
    """Workers read and join packs; the training process makes the batch of them, a fraction of a millisecond."""

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _WorkerIterator(self)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch's own iterator class is no part of its use
        with _stop_signals_blocked():
            before = set(multiprocessing.active_children())
            try:
                batches = super().__iter__()
            except (OSError, RuntimeError) as error:
                reason = explain_resource(error)
                if reason is None:
                    raise
                started = set(multiprocessing.active_children()) - before
                _kill(started)  # at once: torch's iterator, half made, forgets them
                raise UserError(
                    f"data.workers: loader process {len(started) + 1} of {self.num_workers} could not be started: "
                    f"{reason}"
                ) from None
            finally:
                _WORKERS.update(set(multiprocessing.active_children()) - before)
            workers = getattr(batches, "_workers", [])
        try:
            yield from map(finish, batches)
        except UserError as error:  # of a worker; torch wraps the text into a traceback of that process
            name = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise type(error)(str(error).rpartition(name)[2].strip()) from None
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise explain_dead_worker(error) or error from None
            assert isinstance(self.dataset, PackDataset)
            raise DataError(
                f"{self.dataset.location}: no batch in {self.timeout:.0f} s; check the storage and the network, give "
                "the run more loader `data.workers`, or raise `data.timeout_seconds`"
            ) from None
        finally:
            if self.num_workers:  # not left to the garbage collector, in which torch waits 5 s for each of them
                batches._shutdown_workers()  # type: ignore[attr-defined]
                _kill(workers)


def data_spec(dataset: PackDataset, *, workers: int, timeout_seconds: float) -> DataSpec:
    """A loader of this rank's batches, with the counts that Composer needs."""
    loader = PackLoader(
        dataset,
        batch_size=dataset.batch_packs // dataset.num_ranks,
        collate_fn=join,
        num_workers=workers,
        # A worker that neither delivers nor fails must stop the run too; but one that fails has the time to say why.
        timeout=PATIENCE * timeout_seconds + START_SECONDS if workers else 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_init_worker if workers else None,
        # Whatever the default: workers share the locks and arrays that the data set made.
        multiprocessing_context="fork" if workers else None,
        persistent_workers=False,
    )
    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=count_packs,
        get_num_tokens_in_batch=count_tokens,
    )


def explain_resource(error: OSError | RuntimeError) -> str | None:
    """The resource that a new process or thread lacked, its limit, and the remedy; None for another error."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        number = errno.EAGAIN  # what Python made of it
    fewer = "set `data.workers` lower"
    match number:
        case errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"this process may open {limit} files (ulimit -n), and has; raise that limit, or {fewer}"
        case errno.ENFILE:
            return f"the machine's limit of open files is reached (sysctl fs.file-max); raise that limit, or {fewer}"
        case errno.EAGAIN:
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            user = "no limit for the user" if limit == resource.RLIM_INFINITY else f"ulimit -u is {limit}"
            return (
                f"the limit of processes and threads is reached ({user}; of a container: {_read_pids_max()}); raise "
                f"that limit, or {fewer}"
            )
        case errno.ENOMEM:
            return f"no memory is left for another process; give the job more memory, or {fewer}"
        case errno.ENOSPC:
            return f"/dev/shm has no room for the semaphores of its queues; make it larger, or {fewer}"
    return None


def _read_pids_max() -> str:
    """The container's own limit of processes, where its control group shows one."""
    for file in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        with suppress(OSError):
            return f"pids.max is {Path(file).read_text().strip()}"
    return "pids.max is unknown"


_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\.|exited)")


def explain_dead_worker(error: RuntimeError) -> DataError | None:
    """An error for a loader process that something ended from outside, by torch's words; None for another error.

    torch raises these wherever the training process is when it hears of it, not only in the loader.
    """
    found = _DEAD_WORKER.search(str(error))
    if found is None:
        return None
    how = f"by signal {found[2]}" if found[2] else "from outside"
    return DataError(
        f"data.workers: loader process {found[1]} was ended {how}; most often the machine or the container ran out of "
        "memory (see dmesg): give the job more, or set `data.workers` or `data.fetch_ahead` lower; the same command "
        "resumes from the newest checkpoint"
    )


_WORKERS: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Those that did not end when they were told to: they take no SIGTERM, and hold nothing."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


@atexit.register  # after multiprocessing did, so this comes before its own: that one sends SIGTERM, and waits
def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would call it an error, in the middle of this
    _kill(_WORKERS)


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """They wait until this is over; in processes that are forked meanwhile, until these let them through."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    die_with_parent(rank.pid)
    # Launchers and terminals signal a rank's whole group, systemd and schedulers all processes of a job. The rank then
    # finishes its step and writes a checkpoint, which it could not do without its workers; they end with it.
    os.setpgid(0, 0)
    for number in _STOP_SIGNALS:  # blocked since the fork: what has come already is dropped
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
