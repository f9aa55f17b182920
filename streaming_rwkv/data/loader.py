"""Packs of this rank's and this worker's steps, as batches.

The order is a pure function of the step (`mixture.Plan`); Streaming's shards, cache and readers serve the packs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from streaming_rwkv.config import UserError
from streaming_rwkv.data.batch import Batch, blank_pack, count_packs, count_tokens, finish, join, split_batch
from streaming_rwkv.data.mixture import Plan
from streaming_rwkv.data.order import Ints
from streaming_rwkv.data.setting_names import RUN_SETTINGS, SettingNames
from streaming_rwkv.data.shard_set import ShardSet
from streaming_rwkv.data.streaming_compat import VerifiedDataset
from streaming_rwkv.data.workers import (
    explain_dead_worker,
    explain_resource,
    init_worker,
    kill_workers,
    remember_workers,
    stop_signals_blocked,
)
from streaming_rwkv.limits import memory_limit
from streaming_rwkv.shards import DataError, StreamRecord, check_pack, offsets_of, token_dtype

if TYPE_CHECKING:
    from composer.core import DataSpec

logger = logging.getLogger(__name__)

Batches = Callable[[int, int], Ints]  # (start, stop) → (stop - start, batch_packs) ids of packs, -1 for a blank one
CHUNK_SLOTS = 1 << 15  # slots of the plan that are computed at a time, in about ten milliseconds
FETCH_THREADS = 4
PATIENCE = 3  # timeouts for a batch: a shard that fails when it is fetched ahead, then when it is needed, takes 2.5
START_SECONDS = 30
INPUT_BYTES = 16  # of a batch: each input and its target are 64-bit integers


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Options of fetching packs, which do not change the packs of a step.

    Fields:
        fetch_ahead: packs that each worker looks ahead for shards to fetch, at least a batch.
        cache_limit: bytes of this split's shards to keep, or a size such as '200gb'; None keeps all.
        download_attempts: for a data set in a folder; object storage has deadlines instead.
        timeout_seconds: a download that makes no progress for this long fails.
        names: of the settings, for errors.
    """

    fetch_ahead: int = 64
    cache_limit: str | int | None = None
    download_attempts: int = 3
    timeout_seconds: float = 120.0
    names: SettingNames = RUN_SETTINGS


class PackDataset(VerifiedDataset):
    """The packs of `batches` that belong to this rank and this worker, in order."""

    def __init__(
        self,
        shard_set: ShardSet,
        records: list[StreamRecord],
        *,
        batches: Batches,
        num_batches: int,
        batch_packs: int,
        options: LoaderOptions,
        as_rank: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            shard_set.streams(
                records, download_attempts=options.download_attempts, timeout_seconds=options.timeout_seconds
            ),
            lock=shard_set.cache / f".{records[0].split}.lock",
            cache_limit=options.cache_limit,
            fetch_ahead=max(options.fetch_ahead, batch_packs),
            batch=batch_packs,
            as_rank=as_rank,
            names=options.names,
        )
        if batch_packs % self.num_ranks:
            raise ValueError(f"{batch_packs} packs do not divide among {self.num_ranks} ranks")
        check_batch_fits(records, packs=batch_packs // self.num_ranks, names=options.names)
        self.location = shard_set.location
        self.names = options.names
        self.records = records
        self.manifest = shard_set.manifest
        self.batches = batches
        self.num_batches = num_batches
        self.batch_packs = batch_packs
        self.first_batch = 0
        self._first_pack = self.sample_offset_per_stream
        self._blank = blank_pack(self.manifest.tokenizer.bos_id, token_dtype(self.manifest.tokenizer.vocab_size))

    def __len__(self) -> int:
        """Return the number of packs for this rank in the whole run."""
        return self.num_batches * self.batch_packs // self.num_ranks

    def start_at(self, batch: int) -> None:
        """Begin the next iteration with this batch."""
        self.first_batch = batch

    def _ids(self) -> Iterator[int]:
        worker, workers = self.worker()
        return share_of_batches(
            self.batches,
            start=self.first_batch,
            stop=self.num_batches,
            batch_packs=self.batch_packs,
            rank=self.rank,
            ranks=self.num_ranks,
            worker=worker,
            workers=workers,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield packs, with shards fetched ahead in threads.

        Streaming's own iteration ends silently, or hangs, when a shard cannot be prepared. Here a shard that cannot be
        fetched ahead is tried again, and raises, when its first pack is needed.
        """
        ids = self._ids()
        window: deque[int] = deque()
        in_window: Counter[int] = Counter()
        with ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch") as executor:
            try:
                for pack in ids:
                    window.append(pack)
                    if pack >= 0:
                        shard = self.shard_of(pack)
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
        shard = self.shard_of(pack)
        in_window[shard] -= 1
        if not in_window[shard]:
            del in_window[shard]
        return self[pack]

    def _fetch_ahead(self, shard: int) -> None:
        if self.is_local(shard):
            return
        try:
            self.prepare_shard(shard, blocking=False)
        except Exception as error:  # noqa: BLE001 - reading the shard tries again, and raises
            logger.debug("fetching ahead failed: %s", error)

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a pack by its global id, checked against the on-disk contract."""
        sample = super().get_item(sample_id, retry)
        stream = int(np.searchsorted(self._first_pack, sample_id, side="right")) - 1
        check_pack(
            sample,
            stream=self.records[stream],
            manifest=self.manifest,
            where=f"{self.streams[stream].remote}, pack {sample_id - int(self._first_pack[stream])}",
        )
        sample["stream"] = stream
        return sample


def check_batch_fits(records: list[StreamRecord], *, packs: int, names: SettingNames) -> None:
    """Refuse batches that cannot be in memory, wherever their packs come from.

    Raises:
        UserError: names the setting, and the limit of this process's memory.
    """
    least = int(INPUT_BYTES * packs * min(record.targets_per_pack for record in records))
    limit, name = memory_limit()
    if least > limit:
        raise UserError(
            f"{names.batch}: each process reads {packs:,} packs of a step, at least {least:,} bytes, but can have only "
            f"{limit:,} bytes ({name}); lower it, or use more processes"
        )


def share_of_batches(
    batches: Batches, *, start: int, stop: int, batch_packs: int, rank: int, ranks: int, worker: int, workers: int
) -> Iterator[int]:
    """Yield the packs that one worker of one rank reads for batches start … stop - 1.

    Each rank reads its part of every batch; DataLoader takes a rank's n-th batch from worker n modulo workers.
    """
    per_rank = batch_packs // ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    chunk = max(1, CHUNK_SLOTS // batch_packs)
    for chunk_start in range(start, stop, chunk):
        chunk_stop = min(chunk_start + chunk, stop)
        first = (worker - (chunk_start - start)) % workers
        yield from batches(chunk_start, chunk_stop)[first::workers, mine].ravel().tolist()


def evaluation_batches(packs: list[int], *, batch_packs: int, per_stream: int | None = None) -> tuple[Batches, int]:
    """Return batches of every pack of every stream (or its first `per_stream`) once, in order, and their number.

    Blank packs fill up the last batch.
    """
    first = offsets_of(packs)
    chosen = [first[i] + np.arange(min(n, per_stream or n)) for i, n in enumerate(packs)]
    ids = np.concatenate(chosen).astype(np.int64)
    num_batches = -(-len(ids) // batch_packs)
    table = np.pad(ids, (0, num_batches * batch_packs - len(ids)), constant_values=-1).reshape(-1, batch_packs)
    return lambda start, stop: table[start:stop], num_batches


def training_batches(plan: Plan) -> tuple[Batches, int]:
    """Return the batches of a run's plan, and their number."""
    return plan.packs, plan.steps


class _WorkerIterator(_MultiProcessingDataLoaderIter):
    """torch's iterator, whose destructor raises errors if a worker could not be started, and in a forked process."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.process = os.getpid()
        super().__init__(loader)

    def __del__(self) -> None:
        # The status is set when all workers have been started.
        if hasattr(self, "_workers_status") and self.process == os.getpid():
            super().__del__()


class PackLoader(DataLoader[Any]):
    """Loader whose workers read and join packs; the training process turns them into a batch in a fraction of a ms."""

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _WorkerIterator(self)

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]  # callers use no more of torch's iterator class
        dataset = self.dataset
        assert isinstance(dataset, PackDataset)
        names = dataset.names
        with stop_signals_blocked():
            before = set(multiprocessing.active_children())
            try:
                batches = super().__iter__()
            except (OSError, RuntimeError) as error:
                reason = explain_resource(error, names=names)
                if reason is None:
                    raise
                started = set(multiprocessing.active_children()) - before
                kill_workers(started)  # now: torch's unfinished iterator does not know them
                raise UserError(
                    f"{names.workers}: loader process {len(started) + 1} of {self.num_workers} could not be started: "
                    f"{reason}"
                ) from None
            finally:
                remember_workers(set(multiprocessing.active_children()) - before)
            workers = getattr(batches, "_workers", [])
        try:
            yield from map(finish, batches)
        except UserError as error:  # of a worker: torch puts the message at the end of that process's traceback
            name = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise type(error)(str(error).rpartition(name)[2].strip()) from None
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise explain_dead_worker(error, names=names) or error from None
            raise DataError(
                f"{dataset.location}: no batch in {self.timeout:.0f} s; check the storage and the network, give "
                f"the run more loader `{names.workers}`, or raise `{names.timeout_seconds}`"
            ) from None
        finally:
            # Not left to the garbage collector, where torch waits 5 s for each worker.
            if isinstance(batches, _WorkerIterator) and batches.process == os.getpid():
                batches._shutdown_workers()
                kill_workers(workers)


def pack_loader(dataset: PackDataset, *, workers: int, timeout_seconds: float) -> PackLoader:
    """Return a loader of this rank's batches.

    Args:
        workers: processes that read and join packs; 0 reads in this process.
        timeout_seconds: limit of a download without progress; that of a batch is larger.
    """
    return PackLoader(
        dataset,
        batch_size=dataset.batch_packs // dataset.num_ranks,
        collate_fn=join,
        num_workers=workers,
        # A worker that neither delivers nor fails must stop the run too; one that fails has time to report why.
        timeout=PATIENCE * timeout_seconds + START_SECONDS if workers else 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=init_worker if workers else None,
        # Whatever the default is: workers share the locks and arrays that the dataset made.
        multiprocessing_context="fork" if workers else None,
        persistent_workers=False,
    )


def data_spec(dataset: PackDataset, *, workers: int, timeout_seconds: float) -> DataSpec:
    """Return a loader of this rank's batches, with the counts that Composer needs."""
    return loader_spec(pack_loader(dataset, workers=workers, timeout_seconds=timeout_seconds))


def loader_spec(loader: PackLoader) -> DataSpec:
    """Return a loader with the counts that Composer needs."""
    from composer.core import DataSpec  # takes seconds, and other training loops do not need it

    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=count_packs,
        get_num_tokens_in_batch=count_tokens,
    )
