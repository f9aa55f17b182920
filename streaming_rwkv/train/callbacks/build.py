"""Callbacks of a run, in the order in which Composer calls them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from composer.core import Callback

from streaming_rwkv.model.flops import flops_per_token
from streaming_rwkv.outputs import CHECKPOINTS
from streaming_rwkv.shards import TOKENIZER_FOLDER
from streaming_rwkv.train.callbacks.checkpointing import Checkpointer
from streaming_rwkv.train.callbacks.clipping import ClipGradient
from streaming_rwkv.train.callbacks.consumption import Consumption
from streaming_rwkv.train.callbacks.learning_rate import LearningRate
from streaming_rwkv.train.callbacks.profiling import Profile
from streaming_rwkv.train.callbacks.samples import Samples
from streaming_rwkv.train.callbacks.stage_number import StageNumber
from streaming_rwkv.train.callbacks.step_seed import StepSeed
from streaming_rwkv.train.callbacks.tasks import TaskScores
from streaming_rwkv.train.callbacks.throughput import Throughput
from streaming_rwkv.train.callbacks.validation import ValidationReport
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.prepare import PreparedRun

if TYPE_CHECKING:
    from streaming_rwkv.inference.tasks import Tasks


@dataclass(frozen=True, kw_only=True)
class RunCallbacks:
    """The callbacks of a run; the named ones carry state that a checkpoint restores, or that ends the run."""

    all: list[Callback]
    samples: Samples
    clipping: ClipGradient
    consumption: Consumption
    checkpointer: Checkpointer


def build_callbacks(
    prepared: PreparedRun, *, mirror: Mirror | None, peak_flops: float | None, tasks: Tasks | None = None
) -> RunCallbacks:
    """Return the callbacks of a run.

    Args:
        tasks: loaded `evaluation.tasks`, on rank 0.
        peak_flops: of all processes together, in FLOP/s, or None if it is unknown.
    """
    config, plan = prepared.config, prepared.plan
    save_folder, interval = Path(config.save_folder), config.log.interval_steps
    consumption = Consumption(plan.streams, interval_steps=interval, last_step=plan.steps)
    clipping = ClipGradient(
        config.optimizer.gradient_clip,
        on_nonfinite=config.on_nonfinite,
        on_spike=config.on_spike,
        skip_steps=config.data.skip_steps,
    )
    checkpointer = Checkpointer(
        save_folder / CHECKPOINTS,
        interval_steps=config.checkpoint.interval_steps,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        last_step=plan.steps,
        run=prepared.identity,
        slots_before=plan.slots_before,
        consumption=consumption,
        clipping=clipping,
        mirror=mirror,
    )
    samples = Samples(
        save_folder / "samples.jsonl",
        config.evaluation,
        tokenizer_folder=save_folder / TOKENIZER_FOLDER,
        seed=config.seed,
    )
    callbacks: list[Callback] = [
        StepSeed(config.seed),
        samples,  # before Throughput, whose next window begins after an evaluation
        *_task_scores(prepared, tasks),
        LearningRate(config.optimizer, total_tokens=prepared.total_tokens),
        StageNumber(plan.stage_of),
        clipping,
        consumption,
        Throughput(
            total_tokens=prepared.total_tokens,
            flops_per_token=flops_per_token(prepared.model),
            peak_flops=peak_flops,
            interval_steps=interval,
            last_step=plan.steps,
        ),
        checkpointer,
    ]
    callbacks += _optional_callbacks(prepared)
    return RunCallbacks(
        all=callbacks, samples=samples, clipping=clipping, consumption=consumption, checkpointer=checkpointer
    )


def _task_scores(prepared: PreparedRun, tasks: Tasks | None) -> list[Callback]:
    config = prepared.config
    if not config.evaluation.tasks:
        return []
    tokenizer_folder = Path(config.save_folder) / TOKENIZER_FOLDER
    return [TaskScores(config.evaluation, tasks, tokenizer_folder=tokenizer_folder, last_step=prepared.plan.steps)]


def _optional_callbacks(prepared: PreparedRun) -> list[Callback]:
    config, callbacks = prepared.config, list[Callback]()
    if config.profile is not None:
        callbacks.append(Profile(Path(config.save_folder), config.profile))
    if validation_records := prepared.shard_set.manifest.select("validation"):
        callbacks.append(ValidationReport(validation_records))
    return callbacks
