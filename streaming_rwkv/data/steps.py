"""Batches of the steps of one rank, for any training loop: `open_dataset`.

Training by `streaming-rwkv train` reads its packs through the same `StepDataset`, with the plan of its configuration.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from streaming_rwkv import distributed
from streaming_rwkv.config import Config, ConfigError, validate
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.data.loader import LoaderOptions, PackDataset, pack_loader, training_batches
from streaming_rwkv.data.mixture import Plan, StageConfig, count_batch_packs, make_plan
from streaming_rwkv.data.setting_names import ARGUMENTS
from streaming_rwkv.data.shard_set import ShardSet, check_cache, check_shards, least_cache_bytes, open_shard_set
from streaming_rwkv.location import checked_local
from streaming_rwkv.quantities import ByteCount, LoaderWorkers, PositiveCount, PositiveInt, Seconds
from streaming_rwkv.shards import Manifest, Split, StreamRecord


class _Iteration(Iterator[Batch]):
    """The batches of a dataset from its step on, until a newer iteration begins or the dataset is closed."""

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset, self._loaded = dataset, iter(dataset.loader)

    def __next__(self) -> Batch:
        self._dataset.check_process()
        if self._dataset.iteration is not self:
            raise ValueError(
                "this iteration has ended: a newer one began, the step was set, or the dataset was closed; iterate anew"
            )
        batch = next(self._loaded)
        self._dataset.step += 1
        return batch

    def end(self) -> None:
        self._loaded.close()


class StepDataset:
    """The batches of a training run's steps that belong to one rank, in order.

    An iteration begins at `step` and ends after the last step. `step` counts the batches that were taken, so after any
    batch it is the whole state: a dataset that is opened with it as `start_step` continues with the next batch. With
    the same data, stages, batch size and seed, a step has the same packs whatever the numbers of ranks and workers are.

    Attributes:
        step: the number of the next batch.
    """

    def __init__(
        self,
        packs: PackDataset,
        *,
        workers: int,
        timeout_seconds: float,
    ) -> None:
        """Read the batches of `packs`; for the other arguments see `pack_loader`."""
        self.packs = packs
        self.loader = pack_loader(packs, workers=workers, timeout_seconds=timeout_seconds)
        self.resources = ExitStack()  # to be closed with this dataset
        self.step = 0
        self.iteration: _Iteration | None = None
        self._is_open, self._process = True, os.getpid()

    @property
    def manifest(self) -> Manifest:
        """The data set's manifest; its `fingerprint` identifies the data."""
        return self.packs.manifest

    @property
    def streams(self) -> list[StreamRecord]:
        """The streams that the ids in `batch["streams"]` stand for, with source, bucket and counts."""
        return self.packs.records

    @property
    def batch_packs(self) -> int:
        """Packs of a step, over all ranks."""
        return self.packs.batch_packs

    def __len__(self) -> int:
        """Return the number of steps of all stages, wherever the iteration begins."""
        return self.packs.num_batches

    def start_at(self, step: int, *, name: str = "step") -> None:
        """Begin the next iteration with the batch of this step, counted from 0.

        Args:
            name: of the argument, for errors.
        Raises:
            ConfigError: the dataset has no such step.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= len(self):
            raise ConfigError(
                f"{name}: found {step!r}, expected a whole number from 0 to {len(self)}, the number of steps; a state "
                "belongs to one data set, list of stages and batch size: give those with which it was saved"
            )
        self._stop()
        self.step = step
        self.packs.start_at(step)

    def __iter__(self) -> Iterator[Batch]:
        """Return the batches from `step` on; a new iteration ends the last one, which then raises a ValueError.

        Raises:
            DataError: a shard is missing or damaged, or no batch came in time.
            UserError: loader processes cannot be started.
        """
        self.check_process()
        if not self._is_open:
            raise ValueError("this dataset is closed; open it again, with its `step` as `start_step`")
        self.start_at(self.step)
        self.iteration = _Iteration(self)
        return self.iteration

    def check_process(self) -> None:
        """Refuse to read in a process that was forked, whose parent has the loader's processes.

        Raises:
            ValueError: this is another process than the one that opened the dataset.
        """
        if os.getpid() != self._process:
            raise ValueError("this dataset was opened in another process; open one here, with its `step`")

    def state_dict(self) -> dict[str, int]:
        """Return the state after the batches that were taken: {"step": step}."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batches that were taken when `state_dict` returned `state`.

        Raises:
            ConfigError: not such a state, or this dataset has fewer steps.
        """
        if not isinstance(state, Mapping) or set(state) != {"step"}:
            found = f"the keys {sorted(map(str, state))}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
            raise ConfigError(
                f"state: found {found}, expected 'step' alone; give what `state_dict` of such a dataset returned"
            )
        self.start_at(state["step"], name="state: step")

    def __getstate__(self) -> None:
        raise TypeError("an open dataset cannot be sent to another process; open one there, with this one's `step`")

    def close(self) -> None:
        """End the loader's processes, close the shards and remove a temporary cache; nothing can be read afterwards.

        In a process that was forked nothing happens: these are its parent's.
        """
        if os.getpid() != self._process:
            return
        self._is_open = False
        self._stop()
        self.resources.close()

    def _stop(self) -> None:
        if self.iteration is not None:
            self.iteration.end()
            self.iteration = None

    def __enter__(self) -> StepDataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_packs(
    shard_set: ShardSet, plan: Plan, *, options: LoaderOptions, as_rank: tuple[int, int] | None = None
) -> PackDataset:
    """Return the packs of all steps of a plan, in its order.

    Args:
        as_rank: see `streaming_compat.VerifiedDataset`.
    """
    batches, num_batches = training_batches(plan)
    return PackDataset(
        shard_set,
        plan.streams,
        batches=batches,
        num_batches=num_batches,
        batch_packs=plan.batch_packs,
        options=options,
        as_rank=as_rank,
    )


def open_dataset(
    location: str | Path,
    *,
    stages: Sequence[StageConfig | Mapping[str, Any]] = (StageConfig(passes=1),),
    batch_tokens: int | None = None,
    batch_packs: int | None = None,
    seed: int = 17,
    rank: int | None = None,
    world_size: int | None = None,
    start_step: int = 0,
    split: Split = "train",
    fraction: float = 1.0,
    workers: int = 2,
    cache: str | Path | None = None,
    cache_limit: int | None = None,
    shuffle_block_shards: int = 4,
    timeout_seconds: float = 120.0,
) -> StepDataset:
    """Open a data set that `prep` built, as the batches of one rank of a training run.

    Each step has the packs on which `streaming-rwkv train` trains with the same `data.stages`, batch size, seed,
    `data.fraction` and `data.shuffle_block_shards`, for any numbers of ranks and workers. Shards are verified, and
    fetched ahead.

        with open_dataset("/data/stage2", stages=[{"tokens": 10**9}], batch_tokens=65536) as dataset:
            for batch in dataset:
                nll = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"], targets=batch["targets"])

    Args:
        location: a folder, or s3://bucket/prefix.
        stages: mixtures, one after another, each with its length in `tokens` or `passes`, as StageConfig or a mapping
            (docs/mixtures.md); by default one pass over everything.
        batch_tokens: tokens of a step over all ranks, rounded to whole packs on each; give this or `batch_packs`.
        rank, world_size: of this process; by default those of torch.distributed's process group, or 0 of 1. There need
            not be a process group.
        start_step: the step to begin with, such as the one of an earlier `state_dict`.
        fraction: part of every stream's packs to read, chosen by the seed.
        workers: loader processes, forked; 0 reads in this process.
        cache: folder for shards, kept for the next run; by default a temporary folder of this process. Processes of a
            launcher with a process group share the folder on each node, and must all make this call.
        cache_limit: bytes of shards to keep there; by default all.
        shuffle_block_shards: shards whose packs are shuffled together.
        timeout_seconds: a download without progress for this long fails.
    Returns:
        The batches, on the CPU; see `Batch` for their tensors.
    Raises:
        ConfigError: arguments that are not valid, or stages that the data cannot meet.
        DataError: no data set at the location, or a damaged one.
        UserError: another process uses the cache.
    """
    return _open(validate(_Arguments, locals(), where="open_dataset"))


# Not `str | Path`, with an error for each of them; and a Path would make one slash of those of s3://.
_PathText = Annotated[str, BeforeValidator(lambda path: str(path) if isinstance(path, Path) else path)]


class _Arguments(Config):
    """Arguments of `open_dataset`."""

    location: _PathText
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    batch_tokens: PositiveCount | None
    batch_packs: PositiveInt | None
    seed: NonNegativeInt
    rank: NonNegativeInt | None
    world_size: PositiveInt | None
    start_step: NonNegativeInt
    split: Split
    fraction: Annotated[float, Field(gt=0, le=1)]
    workers: LoaderWorkers
    cache: _PathText | None
    cache_limit: Annotated[ByteCount, Field(gt=0)] | None
    shuffle_block_shards: PositiveInt
    timeout_seconds: Seconds

    @model_validator(mode="after")
    def _fit_together(self) -> _Arguments:
        if (self.batch_tokens is None) == (self.batch_packs is None):
            raise ValueError("give either `batch_tokens` or `batch_packs`, the size of a step over all ranks")
        if (self.rank is None) != (self.world_size is None):
            raise ValueError("give both `rank` and `world_size`, or neither for those of the process group")
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ValueError(f"rank: found {self.rank}, expected 0 to {self.world_size - 1}, below world_size")
        return self

    @property
    def as_rank(self) -> tuple[int, int]:
        """The rank and the number of ranks."""
        if self.rank is None or self.world_size is None:
            return distributed.rank(), distributed.world_size()
        return self.rank, self.world_size

    @property
    def is_shared(self) -> bool:
        """True if the ranks of a node share the cache, which they must open together."""
        group = distributed.rank(), distributed.world_size()
        in_group = distributed.is_distributed() and distributed.has_launcher() and group[1] > 1
        return self.cache is not None and in_group and self.as_rank == group


def _open(arguments: _Arguments) -> StepDataset:
    with ExitStack() as resources:
        shard_set = _open_shards(arguments, resources)
        plan = _plan(arguments, shard_set.manifest)
        used = [stream for stream, packs in zip(plan.streams, plan.end, strict=True) if packs]
        check_shards(shard_set, used)
        options = LoaderOptions(
            cache_limit=arguments.cache_limit, timeout_seconds=arguments.timeout_seconds, names=ARGUMENTS
        )
        as_rank = None if arguments.is_shared else arguments.as_rank
        packs = open_packs(shard_set, plan, options=options, as_rank=as_rank)
        resources.callback(packs.close)
        dataset = StepDataset(packs, workers=arguments.workers, timeout_seconds=arguments.timeout_seconds)
        dataset.start_at(arguments.start_step, name="open_dataset: start_step")
        dataset.resources = resources.pop_all()
    return dataset


def _open_shards(arguments: _Arguments, resources: ExitStack) -> ShardSet:
    """Open the data set's files in the cache, once on each node if its ranks share it."""
    (rank, ranks), is_shared = arguments.as_rank, arguments.is_shared
    if arguments.cache is None:
        cache = Path(resources.enter_context(TemporaryDirectory(prefix="streaming-rwkv-", ignore_cleanup_errors=True)))
    else:
        check_cache(checked_local(arguments.cache), names=ARGUMENTS)
        cache = Path(arguments.cache) / arguments.split
        if ranks > 1 and not is_shared:
            cache = cache / f"rank-{rank}"

    def opened(fetch: bool) -> ShardSet:
        return open_shard_set(
            arguments.location,
            cache=cache,
            splits=[arguments.split],
            timeout_seconds=arguments.timeout_seconds,
            fetch=fetch,
            names=ARGUMENTS,
        )

    shard_set = distributed.run_on_local_rank_zero(lambda: opened(True)) if is_shared else opened(True)
    shard_set = shard_set or opened(False)  # after local rank 0 has fetched the files
    if shard_set.store is not None:
        resources.callback(shard_set.store.close)
    if shard_set.lock is not None:
        resources.callback(shard_set.lock.release)
    return shard_set


def _plan(arguments: _Arguments, manifest: Manifest) -> Plan:
    records = manifest.select(arguments.split)
    if not records:
        raise ConfigError(f"open_dataset: {arguments.location} has no {arguments.split} packs; choose another `split`")
    least = least_cache_bytes(records)
    if arguments.cache_limit is not None and arguments.cache_limit < least:
        raise ConfigError(
            f"open_dataset: cache_limit: found {arguments.cache_limit:,} bytes, but at least {least:,} are needed: "
            "four of the largest shards, compressed and expanded; raise it"
        )
    batch_packs = count_batch_packs(
        batch_tokens=arguments.batch_tokens,
        batch_packs=arguments.batch_packs,
        pack_tokens=manifest.pack_tokens,
        world_size=arguments.as_rank[1],
        where="open_dataset: ",
    )
    return make_plan(
        arguments.stages,
        records,
        batch_packs=batch_packs,
        seed=arguments.seed,
        block_shards=arguments.shuffle_block_shards,
        share=arguments.fraction,
        where="open_dataset: stages",
    )
