"""A run's configuration resolved against its data: network shape, steps and packs of each step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.data.mixture import ORDER_VERSION, Plan, StageConfig, count_batch_packs, make_plan
from streaming_rwkv.data.shard_set import ShardSet, cached_sizes, check_shards, least_cache_bytes, open_shard_set
from streaming_rwkv.model.config import RWKV7Config
from streaming_rwkv.model.state import infer_config
from streaming_rwkv.model.weights import read_state
from streaming_rwkv.shards import SPLITS, Manifest, Split, TokenizerRecord
from streaming_rwkv.train.checkpoints.restore import local_checkpoint
from streaming_rwkv.train.config import DataConfig, ModelConfig, RunConfig
from streaming_rwkv.train.optimizer import lr_multiplier

logger = logging.getLogger(__name__)

FEW_STEPS = 10
MOST_CHECKPOINTS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run whose configuration, data and plan agree; nothing is trained yet."""

    config: RunConfig
    shard_set: ShardSet
    plan: Plan
    model: RWKV7Config
    total_tokens: int
    cache_limits: dict[Split, int | None]  # bytes
    identity: dict[str, Any]  # determines the steps already taken; a checkpoint made with another one is refused


def prepare(config: RunConfig, *, world_size: int, fetch: bool, shape: Mapping[str, Any] | None = None) -> PreparedRun:
    """Open the data set and plan the run.

    Args:
        fetch: fetch and check the data set's files; only local rank 0 does. The other ranks read the files afterwards.
        shape: of the network that `model.init_from` names, if it is known already.
    Raises:
        UserError: the configuration or the data would stop the run later.
    """
    data = config.data
    shard_set = open_shard_set(
        data.path,
        cache=data.cache or Path(config.save_folder) / "cache",
        splits=("train", "validation"),
        timeout_seconds=data.timeout_seconds,
        fetch=fetch,
    )
    manifest = shard_set.manifest
    limits = split_cache_limit(data.cache_limit, manifest)
    if not manifest.select("validation"):
        for name, what in (("prompts", "texts are sampled"), ("tasks", "tasks are scored")):
            if getattr(config.evaluation, name):
                raise ConfigError(
                    f"evaluation.{name}: {what} at evaluations, but {data.path} has no validation packs; build it with "
                    f"`validation` above 0, or leave the {name} out"
                )
    plan = _plan(config, manifest, world_size=world_size)
    _check_number_of_checkpoints(config, steps=plan.steps)
    if fetch:
        used = [stream for stream, packs in zip(plan.streams, plan.end, strict=True) if packs]
        check_shards(shard_set, [*used, *manifest.select("validation")])
        _warn_of_few_steps(plan)
        _warn_of_large_microbatch(config, packs=plan.batch_packs // world_size, world_size=world_size)
    model = resolve_model(config.model, manifest.tokenizer, shape)
    total_tokens = round(float(plan.expected_targets().sum()))
    lr_multiplier(config.optimizer, tokens_seen=0, total_tokens=total_tokens)  # raises if the schedule does not fit
    return PreparedRun(
        config=config,
        shard_set=shard_set,
        plan=plan,
        model=model,
        total_tokens=total_tokens,
        cache_limits=limits,
        identity=_identity(config, manifest=manifest, plan=plan, model=model),
    )


def _identity(config: RunConfig, *, manifest: Manifest, plan: Plan, model: RWKV7Config) -> dict[str, Any]:
    """Return the settings that decide the steps of a run; a part that is not used is left out, as in older marks."""
    data = config.data
    memory_only = {"activation_checkpointing", "loss_chunk_tokens", "preset"}
    return {
        "data": manifest.fingerprint,
        "tokenizer": manifest.tokenizer.sha256,
        "mixture": [stage.model_dump(exclude_none=True) for stage in all_stages(data)],
        "batch_packs": plan.batch_packs,
        "order": {
            "version": ORDER_VERSION,
            "block_shards": data.shuffle_block_shards,
            "seed": config.seed,
            **({"fraction": data.fraction} if data.fraction != 1 else {}),
        },
        "model": model.model_dump(exclude=memory_only),
        "optimizer": config.optimizer.model_dump(mode="json"),
        **({"skip_steps": [list(steps) for steps in data.skip_steps]} if data.skip_steps else {}),
    }


def _plan(config: RunConfig, manifest: Manifest, *, world_size: int) -> Plan:
    data = config.data
    batch_packs = count_batch_packs(
        batch_tokens=data.batch_tokens,
        batch_packs=data.batch_packs,
        pack_tokens=manifest.pack_tokens,
        world_size=world_size,
        where="data.",
    )
    return make_plan(
        all_stages(data),
        manifest.select("train"),
        batch_packs=batch_packs,
        seed=config.seed,
        block_shards=data.shuffle_block_shards,
        share=data.fraction,
    )


def _check_number_of_checkpoints(config: RunConfig, *, steps: int) -> None:
    interval = config.checkpoint.interval_steps
    if steps // interval > MOST_CHECKPOINTS:
        raise ConfigError(
            f"checkpoint.interval_steps: found {interval:,}, and the run has {steps:,} steps, so {steps // interval:,} "
            f"checkpoints; expected at most {MOST_CHECKPOINTS:,}; raise it, or shorten `data.stages`"
        )


def _warn_of_few_steps(plan: Plan) -> None:
    if plan.steps < FEW_STEPS:
        logger.warning(
            "the run has only %d step(s) of %d pack(s): enough to try the commands, not to train a model",
            plan.steps,
            plan.batch_packs,
        )


def _warn_of_large_microbatch(config: RunConfig, *, packs: int, world_size: int) -> None:
    given = config.microbatch_packs
    if isinstance(given, int) and given > packs:
        logger.warning(
            "microbatch_packs: found %d, but each of %d processes has %d packs of a step; using %d",
            *(given, world_size, packs, packs),
        )


def resolve_model(config: ModelConfig, tokenizer: TokenizerRecord, known: Mapping[str, Any] | None) -> RWKV7Config:
    """Return the network's shape: as configured, otherwise that of `init_from`; by default with the data's vocabulary.

    Args:
        known: shape of the weights that `init_from` names; they are read if it is None.
    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's, or the shape is not valid.
    """
    given = config.model_dump(exclude={"init_from"}, exclude_none=True)
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    if config.init_from is not None and known is None:
        with local_checkpoint(config.init_from) as path:
            known = read_shape(path, where=config.init_from)
    shape |= dict(known or {}) | given
    if shape["vocab_size"] < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: found {shape['vocab_size']}, but the data's tokenizer has {tokenizer.vocab_size} ids; "
            "raise it, or prepare the data with the tokenizer of these weights"
        )
    return validate(RWKV7Config, shape, where="model")


def read_shape(path: Path, *, where: str) -> dict[str, Any]:
    """Return the fields of RWKV7Config that a local file or folder of weights determines."""
    return infer_config(read_state(path), where=where).model_dump(exclude_none=True)


def all_stages(data: DataConfig) -> list[StageConfig]:
    """Return the stages of all cycles, each with its share of the tokens or passes."""
    cycles = data.cycles
    if cycles == 1:
        return list(data.stages)
    once = [
        stage.model_copy(
            update={
                "tokens": stage.tokens and round(stage.tokens / cycles),
                "passes": stage.passes and stage.passes / cycles,
            }
        )
        for stage in data.stages
    ]
    return once * cycles


def split_cache_limit(limit: int | None, manifest: Manifest) -> dict[Split, int | None]:
    """Split `cache_limit` between the training and validation datasets; each evicts only its own shards.

    Validation gets the bytes that it needs, but at most a tenth of the limit if four of its largest shards fit.

    Raises:
        ConfigError: the limit is below four of the largest shards of each split, which Streaming requires.
    """
    if limit is None:
        return {"train": None, "validation": None}
    sizes = {split: cached_sizes(manifest.select(split)) for split in SPLITS}
    least = {split: least_cache_bytes(manifest.select(split)) for split in SPLITS}
    part = min(sum(sizes["validation"]), max(limit // 10, least["validation"]))
    if limit - part < least["train"]:
        raise ConfigError(
            f"data.cache_limit: found {limit:,} bytes, but at least {least['train'] + part:,} are needed: four of the "
            "largest shards, compressed and expanded, of training and of validation; raise it"
        )
    # A split that fits completely needs no limit.
    return {"train": limit - part, "validation": part if part < sum(sizes["validation"]) else None}
