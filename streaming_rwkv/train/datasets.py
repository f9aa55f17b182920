"""Training and validation packs of a run, as Composer loads them."""

from __future__ import annotations

from dataclasses import dataclass

from composer.core import DataSpec, Evaluator

from streaming_rwkv.data.loader import (
    Batches,
    LoaderOptions,
    PackDataset,
    data_spec,
    evaluation_batches,
    training_batches,
)
from streaming_rwkv.distributed import world_size
from streaming_rwkv.shards import StreamRecord
from streaming_rwkv.train.callbacks.validation import evaluation_interval
from streaming_rwkv.train.prepare import PreparedRun


@dataclass(frozen=True, kw_only=True)
class RunDatasets:
    """The training packs with their loader, and an evaluator over the validation packs, if there are any."""

    train_set: PackDataset
    train_loader: DataSpec
    evaluators: list[Evaluator]


def build_datasets(prepared: PreparedRun, *, microbatch: int) -> RunDatasets:
    """Open the training and validation packs of a run.

    Args:
        microbatch: packs of one training pass on each process.
    """
    data, train_set = prepared.config.data, open_training_packs(prepared)
    return RunDatasets(
        train_set=train_set,
        train_loader=data_spec(train_set, workers=data.workers, timeout_seconds=data.timeout_seconds),
        evaluators=build_evaluators(prepared, microbatch=microbatch),
    )


def open_training_packs(prepared: PreparedRun) -> PackDataset:
    """Return the packs of the whole run, in the order of its plan."""
    plan = prepared.plan
    return _open_packs(prepared, plan.streams, *training_batches(plan), plan.batch_packs)


def _open_packs(
    prepared: PreparedRun, records: list[StreamRecord], batches: Batches, num_batches: int, batch_packs: int
) -> PackDataset:
    data = prepared.config.data
    options = LoaderOptions(
        fetch_ahead=max(data.fetch_ahead, batch_packs),
        cache_limit=prepared.cache_limits[records[0].split],
        download_attempts=data.download_attempts,
        timeout_seconds=data.timeout_seconds,
    )
    return PackDataset(
        prepared.shard_set,
        records,
        batches=batches,
        num_batches=num_batches,
        batch_packs=batch_packs,
        options=options,
    )


def build_evaluators(prepared: PreparedRun, *, microbatch: int) -> list[Evaluator]:
    """Return one evaluator over all validation packs, or none if the data set has no validation packs."""
    records = prepared.shard_set.manifest.select("validation")
    if not records:
        return []
    evaluation = prepared.config.evaluation
    per_rank = evaluation.microbatch_packs or (microbatch if prepared.config.microbatch_packs else 1)
    batch_packs = per_rank * world_size()
    batches, num_batches = evaluation_batches(
        [record.packs for record in records], batch_packs=batch_packs, per_stream=evaluation.packs_per_stream
    )
    dataset = _open_packs(prepared, records, batches, num_batches, batch_packs)
    return [
        Evaluator(
            label="eval",
            # In the training process: worker processes would be started anew for each evaluation.
            dataloader=data_spec(dataset, workers=0, timeout_seconds=prepared.config.data.timeout_seconds),
            metric_names=["loss"],
            eval_interval=evaluation_interval(evaluation.interval_steps, last_step=prepared.plan.steps),
        )
    ]
