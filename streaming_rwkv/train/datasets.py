"""Training and validation packs of a run, as Composer loads them."""

from __future__ import annotations

from dataclasses import dataclass

from composer.core import DataSpec, Evaluator

from streaming_rwkv.data.loader import LoaderOptions, PackDataset, data_spec, evaluation_batches, loader_spec
from streaming_rwkv.data.steps import StepDataset, open_packs
from streaming_rwkv.distributed import world_size
from streaming_rwkv.shards import Split
from streaming_rwkv.train.callbacks.validation import evaluation_interval
from streaming_rwkv.train.prepare import PreparedRun


@dataclass(frozen=True, kw_only=True)
class RunDatasets:
    """The training data with its loader, and an evaluator over the validation packs, if there are any."""

    train_set: StepDataset
    train_loader: DataSpec
    evaluators: list[Evaluator]


def build_datasets(prepared: PreparedRun, *, microbatch: int) -> RunDatasets:
    """Open the training and validation packs of a run.

    Args:
        microbatch: packs of one training pass on each process.
    """
    data = prepared.config.data
    train_set = StepDataset(open_training_packs(prepared), workers=data.workers, timeout_seconds=data.timeout_seconds)
    return RunDatasets(
        train_set=train_set,
        train_loader=loader_spec(train_set.loader),
        evaluators=build_evaluators(prepared, microbatch=microbatch),
    )


def open_training_packs(prepared: PreparedRun) -> PackDataset:
    """Return the packs of the whole run, in the order of its plan."""
    return open_packs(prepared.shard_set, prepared.plan, options=_loader_options(prepared, "train"))


def _loader_options(prepared: PreparedRun, split: Split) -> LoaderOptions:
    data = prepared.config.data
    return LoaderOptions(
        fetch_ahead=data.fetch_ahead,
        cache_limit=prepared.cache_limits[split],
        download_attempts=data.download_attempts,
        timeout_seconds=data.timeout_seconds,
    )


def build_evaluators(prepared: PreparedRun, *, microbatch: int) -> list[Evaluator]:
    """Return one evaluator over all validation packs, or none if the data set has no validation packs."""
    records = prepared.shard_set.manifest.select("validation")
    if not records:
        return []
    evaluation = prepared.config.evaluation
    per_rank = evaluation.microbatch_packs or (microbatch if prepared.config.microbatch_packs else 1)
    packs = [record.packs for record in records]
    batch_packs = min(per_rank, -(-sum(packs) // world_size())) * world_size()
    batches, num_batches = evaluation_batches(packs, batch_packs=batch_packs, per_stream=evaluation.packs_per_stream)
    dataset = PackDataset(
        prepared.shard_set,
        records,
        batches=batches,
        num_batches=num_batches,
        batch_packs=batch_packs,
        options=_loader_options(prepared, "validation"),
    )
    return [
        Evaluator(
            label="eval",
            # In the training process: worker processes would be started anew for each evaluation.
            dataloader=data_spec(dataset, workers=0, timeout_seconds=prepared.config.data.timeout_seconds),
            metric_names=["loss"],
            eval_interval=evaluation_interval(evaluation.interval_steps, last_step=prepared.plan.steps),
        )
    ]
