"""One training run, from a validated configuration to its last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, Evaluator, Precision
from composer.devices import Device
from composer.loggers import LoggerDestination, TensorboardLogger
from composer.utils import dist, get_device
from torch.distributed.fsdp import FSDPModule

from streaming_rwkv.config import ConfigError, validate
from streaming_rwkv.data.loader import Batches, PackDataset, data_spec, evaluation_batches, training_batches
from streaming_rwkv.data.mixture import ORDER_VERSION, Plan, StageConfig, make_plan
from streaming_rwkv.data.shard_set import ShardSet, check_shards, copy_tokenizer, open_shard_set
from streaming_rwkv.distributed import (
    barrier,
    is_local_rank_zero,
    is_rank_zero,
    local_world_size,
    result_of_rank_zero,
    run_on_all,
    run_on_local_rank_zero,
    run_on_rank_zero,
    world_size,
)
from streaming_rwkv.filesystem import FolderLock, lock_folder, write_atomically
from streaming_rwkv.model.config import RWKV7Config, flops_per_token
from streaming_rwkv.model.init import initialize
from streaming_rwkv.model.rwkv7 import RWKV7
from streaming_rwkv.model.weights import CheckpointError, infer_config, load_state, read_state
from streaming_rwkv.processes import usable_cores
from streaming_rwkv.shards import SPLITS, TOKENIZER_FOLDER, Manifest, Split, StreamRecord, TokenizerRecord
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.train.callbacks import callbacks as cb
from streaming_rwkv.train.callbacks.samples import Samples
from streaming_rwkv.train.checkpoints.local import load_checkpoint, newest_checkpoint
from streaming_rwkv.train.checkpoints.record import Checkpoint, check_resumable
from streaming_rwkv.train.checkpoints.remote import newest_remote
from streaming_rwkv.train.checkpoints.restore import (
    check_place,
    check_same_run,
    local_checkpoint,
    node_checkpoint,
    plan_from,
    restore,
)
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.composer_model import RWKV7ForTraining, sharding
from streaming_rwkv.train.config import ModelConfig, RunConfig
from streaming_rwkv.train.microbatch import densest_pack, probe_microbatch, remembered_microbatch
from streaming_rwkv.train.optimizer import build_optimizer, lr_multiplier
from streaming_rwkv.train.preview import mixture_table, show
from streaming_rwkv.train.trackers import build_trackers, check_trackers, flat_settings

logger = logging.getLogger(__name__)

STOPPED_EARLY = 143  # 128 + SIGTERM, as shells and schedulers have it

# Dense bf16, without sparsity, from NVIDIA's data sheets: what MFU is a share of.
# The first name that a device's contains.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run whose configuration, data and plan agree; nothing is trained yet."""

    config: RunConfig
    shard_set: ShardSet
    plan: Plan
    model: RWKV7Config
    total_tokens: int

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the steps already taken; a checkpoint made with anything else is refused."""
        manifest, config = self.shard_set.manifest, self.config
        memory_only = {"activation_checkpointing", "loss_chunk_tokens", "preset"}
        return {
            "data": manifest.fingerprint,
            "tokenizer": manifest.tokenizer.sha256,
            "mixture": [stage.model_dump(exclude_none=True) for stage in _all_stages(config)],
            "batch_packs": self.plan.batch_packs,
            "order": {"version": ORDER_VERSION, "block_shards": config.data.shuffle_block_shards, "seed": config.seed},
            "model": self.model.model_dump(exclude=memory_only),
            "optimizer": config.optimizer.model_dump(mode="json"),
        }


def prepare(config: RunConfig, *, world_size: int, leader: bool, shape: Mapping[str, Any] | None = None) -> Prepared:
    """Open the data and work out the plan.

    Args:
        shape: of the network that `model.init_from` names, where it is known already.
    Raises:
        UserError: anything in configuration or data that the run could not be finished with.
    """
    check_trackers(config.log)
    data = config.data
    shard_set = open_shard_set(
        data.path,
        cache=data.cache or Path(config.save_folder) / "cache",
        splits=("train", "validation"),
        timeout_seconds=data.timeout_seconds,
        leader=leader,
    )
    manifest = shard_set.manifest
    cache_limits(data.cache_limit, manifest)  # refuses what does not suffice
    if config.evaluation.prompts and not manifest.select("validation"):
        raise ConfigError(
            f"evaluation.prompts: texts are drawn at evaluations, but {data.path} has no validation packs; "
            "build it with `validation` above 0, or leave the prompts out"
        )
    plan = make_plan(
        _all_stages(config),
        manifest.select("train"),
        batch_packs=_batch_packs(config, manifest.pack_tokens, world_size),
        seed=config.seed,
        block_shards=data.shuffle_block_shards,
    )
    if leader:
        drawn = [stream for stream, packs in zip(plan.streams, plan.end, strict=True) if packs]
        check_shards(shard_set, [*drawn, *manifest.select("validation")])
        per_process, given = plan.batch_packs // world_size, config.microbatch_packs
        if isinstance(given, int) and given > per_process:
            logger.warning(
                "microbatch_packs: found %d, but each of %d processes has %d packs of a step; so many are taken",
                *(given, world_size, per_process),
            )
    return Prepared(
        config=config,
        shard_set=shard_set,
        plan=plan,
        model=_model_config(config.model, manifest.tokenizer, shape),
        total_tokens=round(float(plan.expected_targets().sum())),
    )


def _model_config(config: ModelConfig, tokenizer: TokenizerRecord, known: Mapping[str, Any] | None) -> RWKV7Config:
    """The network's shape: as given, else that of the weights to start from; the vocabulary by default the data's."""
    given = config.model_dump(exclude={"init_from"}, exclude_none=True)
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
    if config.init_from is not None and known is None:
        with local_checkpoint(config.init_from) as path:
            known = _shape_of(path, where=config.init_from)
    shape |= dict(known or {}) | given
    if shape["vocab_size"] < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: found {shape['vocab_size']}, but the data's tokenizer has {tokenizer.vocab_size} ids; "
            "raise it, or prepare the data with the tokenizer of these weights"
        )
    return validate(RWKV7Config, shape, where="model")


def _shape_of(path: Path, *, where: str) -> dict[str, Any]:
    return infer_config(read_state(path), where=where).model_dump(exclude_none=True)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What `model.init_from` comes to: the network's shape, and its weights unless the run goes on from later ones."""

    shape: dict[str, Any]
    weights: Path | None


def _find_start(location: str, save_folder: Path, store: Store | None) -> Start:
    """By all ranks together; one reads for all. A run that goes on does not need what it started from any more."""
    root, copy = save_folder / "checkpoints", save_folder / "init_from"
    mark = result_of_rank_zero(lambda: newest_mark(root, store))
    if mark is not None:
        _remove(copy)
        return Start(shape=mark["run"].get("model", {}), weights=None)
    weights = node_checkpoint(location, copy)
    return Start(shape=result_of_rank_zero(lambda: _shape_of(weights, where=location)), weights=weights)


def newest_mark(root: Path, store: Store | None) -> dict[str, Any] | None:
    """What the checkpoint that a run goes on from says of itself, here or in object storage."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(CheckpointError):  # of damage, `restore` says what to do
        if (here := newest_checkpoint(root)) is not None:
            found.append(here.mark)
    with contextlib.suppress(CheckpointError):
        if store is not None and (there := newest_remote(store)) is not None:
            found.append(there.mark)
    return max(found, key=lambda mark: int(mark["step"]), default=None)


def _remove(copy: Path) -> None:
    if is_local_rank_zero():
        shutil.rmtree(copy, ignore_errors=True)


def _all_stages(config: RunConfig) -> list[StageConfig]:
    cycles = config.data.cycles
    if cycles == 1:
        return list(config.data.stages)
    once = [
        stage.model_copy(
            update={
                "tokens": stage.tokens and round(stage.tokens / cycles),
                "passes": stage.passes and stage.passes / cycles,
            }
        )
        for stage in config.data.stages
    ]
    return once * cycles


def _batch_packs(config: RunConfig, pack_tokens: int, world_size: int) -> int:
    data = config.data
    if data.batch_packs is not None:
        if data.batch_packs % world_size:
            raise ConfigError(
                f"data.batch_packs: {data.batch_packs} packs do not divide among {world_size} processes; "
                f"the nearest that do are {data.batch_packs // world_size * world_size or world_size} and "
                f"{-(-data.batch_packs // world_size) * world_size}"
            )
        return data.batch_packs
    assert data.batch_tokens is not None
    return max(1, round(data.batch_tokens / (pack_tokens * world_size))) * world_size


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run that nothing speaks against, on any rank."""

    prepared: Prepared
    start: Start | None
    checkpoint: Checkpoint | None
    mirror: Mirror | None
    device: Device
    lock: FolderLock | None  # of the save folder, held by the leader


def begin(config: RunConfig) -> Begun | None:
    """All that comes before the network is built, by all ranks together; None if the run is finished already.

    Raises:
        UserError: on all ranks, whichever of them met it: none is left waiting for the others.
    """
    # FSDP2's notice that it is experimental: the version is pinned, and resharding is tested.
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental", category=UserWarning)
    device = _find_device(config)
    if device.name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Each process would otherwise take all cores, and they would mostly wait for each other's threads.
        torch.set_num_threads(max(1, usable_cores() // local_world_size()))
    dist.initialize_dist(device, timeout=max(300.0, 4 * config.data.timeout_seconds))
    save_folder = Path(config.save_folder)

    def lock_run() -> FolderLock:
        return lock_folder(save_folder, what="save folder", remedy="give this run its own `save_folder`")

    lock = run_on_rank_zero(lock_run)
    store = None
    if config.save_remote is not None:
        store = open_store(config.save_remote, timeout_seconds=config.checkpoint.upload_timeout_seconds)
    start = _find_start(config.model.init_from, save_folder, store) if config.model.init_from is not None else None
    prepared = _prepare_together(config, shape=start.shape if start else None)
    lr_multiplier(config.optimizer, tokens_seen=0, total_tokens=prepared.total_tokens)  # refuses what does not fit
    mirror = Mirror(store, save_folder, keep=config.checkpoint.keep) if store else None
    allow = frozenset(config.checkpoint.allow_changed)
    if store and mirror:
        check_place(store, prepared.identity, allow=allow)
        mirror.take_over()  # before the newest is looked for: from here on nobody else adds one
    checkpoint, in_store = restore(store, save_folder)
    if checkpoint is not None:
        check_resumable(checkpoint.mark, where=str(checkpoint.path))
        check_same_run(checkpoint, prepared.identity, allow=allow)
        plan = plan_from(prepared.plan, checkpoint.mark, where=str(checkpoint.path))
        prepared = replace(prepared, plan=plan)
        if mirror and not in_store:
            mirror.begin(checkpoint.path, all_on_rank_zero=True)
        if checkpoint.step == prepared.plan.steps:
            if mirror:
                mirror.finish()
            show(f"{checkpoint.path}: this run is finished ({checkpoint.step} steps); nothing to do")
            return None
    shard_set = prepared.shard_set
    run_on_rank_zero(lambda: copy_tokenizer(shard_set, save_folder / TOKENIZER_FOLDER))
    if is_rank_zero():
        write_atomically(save_folder / "config.yaml", config.to_yaml().encode())
        show(mixture_table(prepared.plan, max_repeats=config.data.max_repeats))
        where = f"going on from {checkpoint.path}" if checkpoint else "starting at step 0"
        show(
            f"{prepared.plan.steps} steps of {prepared.plan.batch_packs} packs, "
            f"{prepared.total_tokens:,} tokens; {where}"
        )
    if mirror:
        mirror.send_logs()
    return Begun(prepared=prepared, start=start, checkpoint=checkpoint, mirror=mirror, device=device, lock=lock)


def _find_device(config: RunConfig) -> Device:
    if config.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "device: found gpu, but torch sees no CUDA device; leave it out to train on the CPU, or mend the driver, "
            "or install a torch that is built for it"
        )
    return get_device(config.device)


def _prepare_together(config: RunConfig, *, shape: Mapping[str, Any] | None) -> Prepared:
    """`prepare` by each node's leader, then by the others from what it left."""

    def work() -> Prepared:
        return prepare(config, world_size=world_size(), leader=is_local_rank_zero(), shape=shape)

    led = run_on_local_rank_zero(work)
    read = run_on_all(None if is_local_rank_zero() else work)
    prepared = led or read
    assert prepared is not None
    return prepared


def fit(run: Begun) -> int:
    """Train to the end, or until asked to stop; returns the exit status.

    Raises:
        UserError: a cause outside this program that stops the run, named.
    """
    prepared, start, checkpoint, mirror, device = run.prepared, run.start, run.checkpoint, run.mirror, run.device
    config, plan = prepared.config, prepared.plan
    save_folder = Path(config.save_folder)
    root = save_folder / "checkpoints"
    train_records, validation_records = plan.streams, prepared.shard_set.manifest.select("validation")

    on_gpu = device.name == "gpu"
    precision = config.precision or ("amp_bf16" if on_gpu else "fp32")
    microbatch = _microbatch_packs(prepared, precision=precision, device=device)
    network = RWKV7(prepared.model)
    if checkpoint is None and start is not None:
        assert start.weights is not None  # no mark anywhere, or `restore` would have found its checkpoint
        weights = start.weights
        run_on_all(lambda: load_state(network, read_state(weights), where=str(config.model.init_from)))
        barrier()
        _remove(save_folder / "init_from")
    elif checkpoint is None:
        initialize(network, seed=config.seed)
    model = RWKV7ForTraining(
        network,
        num_streams=max(len(train_records), len(validation_records)),
        flops_per_token=flops_per_token(prepared.model),
    )
    optimizer = build_optimizer(network, config.optimizer)

    batches, num_batches = training_batches(plan)
    train_set = open_packs(prepared, train_records, batches, num_batches, plan.batch_packs)
    interval = config.log.interval_steps
    consumption = cb.Consumption(train_records, interval_steps=interval)
    clipping = cb.ClipGradient(config.optimizer.gradient_clip, on_nonfinite=config.on_nonfinite)
    checkpointer = cb.Checkpointer(
        root,
        interval_steps=config.checkpoint.interval_steps,
        keep=config.checkpoint.keep,
        last_step=plan.steps,
        run=prepared.identity,
        slots_before=plan.slots_before,
        consumption=consumption,
        clipping=clipping,
        mirror=mirror,
    )
    name = torch.cuda.get_device_name() if on_gpu else ""
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    samples = Samples(
        save_folder / "samples.jsonl",
        config.evaluation,
        tokenizer_folder=save_folder / TOKENIZER_FOLDER,
        seed=config.seed,
    )
    callbacks: list[Callback] = [
        cb.StepSeed(config.seed),
        samples,  # before the throughput is taken up again
        cb.LearningRate(config.optimizer, total_tokens=prepared.total_tokens),
        cb.StageNumber(plan.stage_of),
        clipping,
        consumption,
        cb.Throughput(
            total_tokens=prepared.total_tokens,
            flops_per_token=flops_per_token(prepared.model),
            peak_flops=peak * world_size() if peak else None,
            interval_steps=interval,
        ),
        checkpointer,
    ]
    lines = cb.JSONLines(save_folder / "metrics.jsonl")
    loggers: list[LoggerDestination] = [lines]
    if not config.log.progress_bar:
        loggers.append(cb.Console(interval_steps=interval, last_step=plan.steps))
    if config.log.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(save_folder / "tensorboard")))
    trackers = build_trackers(config.log, save_folder=save_folder)
    loggers += trackers
    evaluators = []
    if validation_records:
        callbacks.append(cb.ValidationReport(validation_records))
        evaluators.append(_evaluator(prepared, validation_records, microbatch=microbatch))

    trainer = Trainer(
        run_name=save_folder.name,
        model=model,
        train_dataloader=data_spec(train_set, workers=config.data.workers, timeout_seconds=config.data.timeout_seconds),
        eval_dataloader=evaluators or None,
        max_duration=f"{plan.steps}ba",
        optimizers=optimizer,
        callbacks=callbacks,
        loggers=loggers,
        device=device,
        precision=precision,
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
        dist_timeout=max(300.0, 4 * config.data.timeout_seconds),
        parallelism_config={"fsdp": sharding()} if world_size() > 1 else None,
        progress_bar=config.log.progress_bar,
        spin_dataloaders=False,
        # Composer's own checkpoints and autoresume are not used: see train/checkpoint.py.
        save_folder=None,
        autoresume=False,
    )
    for tracker in trackers:
        tracker.log_hyperparameters(
            flat_settings(config.with_interpolations(config.model_dump(mode="json", exclude_none=True)))
        )
    _average_gradients(network)
    if checkpoint is not None:
        load_checkpoint(checkpoint, model=network, optimizer=optimizer)
        _go_on_at(trainer, train_set, checkpoint)
        consumption.load(checkpoint.mark["consumed"])
        clipping.skipped = checkpoint.mark.get("steps_skipped", 0)
    for written in (lines, samples):
        written.rewind(checkpoint.step if checkpoint else 0)
    checkpointer.listen()
    try:
        trainer.fit()
    except BaseException:
        trainer.engine.close()  # while the cause is on its way: trackers note a run that failed
        raise
    steps = int(trainer.state.timestamp.batch)
    trainer.close()
    if mirror:
        mirror.finish()
    if steps == plan.steps:
        return 0
    if not checkpointer.stopping:
        raise RuntimeError(f"the loader ended after {steps} of {plan.steps} steps")
    show(f"stopped at step {steps} of {plan.steps} as asked; the same command goes on from there")
    return STOPPED_EARLY


def _microbatch_packs(prepared: Prepared, *, precision: str, device: Device) -> int:
    """Packs of one pass on each process: as configured, all of them, or on a GPU as many as fit."""
    config, manifest = prepared.config, prepared.shard_set.manifest
    per_process = prepared.plan.batch_packs // world_size()
    if isinstance(config.microbatch_packs, int):
        return config.microbatch_packs
    if config.microbatch_packs is None or device.name != "gpu":
        return per_process
    pieces_per_pack = densest_pack(prepared.plan.streams, pack_tokens=manifest.pack_tokens)
    conditions = {
        "packs": per_process,
        "pack_tokens": manifest.pack_tokens,
        "pieces_per_pack": pieces_per_pack,
        "precision": precision,
        "model": prepared.model.model_dump(mode="json"),
        "processes": world_size(),
        "device": torch.cuda.get_device_name(),
    }
    found = remembered_microbatch(
        Path(config.save_folder),
        conditions,
        lambda: probe_microbatch(
            prepared.model,
            packs=per_process,
            pack_tokens=manifest.pack_tokens,
            pieces_per_pack=pieces_per_pack,
            precision=Precision(precision),
            device=torch.device("cuda", torch.cuda.current_device()),
        ),
    )
    if is_rank_zero():
        show(f"microbatches of {found} packs, of {per_process} on each process (microbatch_packs: auto)")
    return found


def _average_gradients(network: RWKV7) -> None:
    """Where the backend gives the sum of gradients for their mean (gloo on torch 2.7), divide it.

    AdamW hardly notices a common factor, but gradient norms and clipping do. The backend is asked, not its version.
    """
    ranks = world_size()
    if ranks == 1:
        return
    ones = torch.ones(ranks, device=next(network.parameters()).device)
    mean = torch.empty(1, device=ones.device)
    torch.distributed.reduce_scatter_tensor(mean, ones, op=torch.distributed.ReduceOp.AVG)
    if mean.item() == 1:
        return

    def divide(gradient: torch.Tensor) -> None:
        gradient.div_(ranks)

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(divide)


def _go_on_at(trainer: Trainer, train_set: PackDataset, checkpoint: Checkpoint) -> None:
    mark = checkpoint.mark
    trainer.state.timestamp = trainer.state.timestamp.copy(
        batch=mark["step"],
        batch_in_epoch=mark["step"],
        sample=mark["samples"],
        sample_in_epoch=mark["samples"],
        token=mark["tokens"],
        token_in_epoch=mark["tokens"],
        total_wct=timedelta(seconds=mark["seconds"]),
    )
    train_set.start_at(checkpoint.step)


def cache_limits(limit: int | None, manifest: Manifest) -> dict[Split, int | None]:
    """What of the cache's limit falls to training and to validation: each looks after its own shards alone.

    Validation gets what it needs, but no more than a tenth, unless that would not do.

    Raises:
        ConfigError: not even four of the largest shards, which Streaming wants, fit for each.
    """
    if limit is None:
        return {"train": None, "validation": None}
    sizes = {
        split: [shard.raw_bytes + shard.bytes for stream in manifest.select(split) for shard in stream.shards]
        for split in SPLITS
    }
    least = {split: 4 * max(sizes[split], default=0) for split in SPLITS}
    part = min(sum(sizes["validation"]), max(limit // 10, least["validation"]))
    if limit - part < least["train"]:
        raise ConfigError(
            f"data.cache_limit: found {limit:,} bytes, but at least {least['train'] + part:,} are needed: four of the "
            "largest shards, compressed and expanded, of training and of validation; raise it"
        )
    # What is kept whole needs no limit.
    return {"train": limit - part, "validation": part if part < sum(sizes["validation"]) else None}


def open_packs(
    prepared: Prepared, records: list[StreamRecord], batches: Batches, num_batches: int, batch_packs: int
) -> PackDataset:
    """The packs of `records` in the order of `batches`, with the options of the configuration's `data`."""
    data = prepared.config.data
    return PackDataset(
        prepared.shard_set,
        records,
        batches=batches,
        num_batches=num_batches,
        batch_packs=batch_packs,
        fetch_ahead=max(data.fetch_ahead, batch_packs),
        cache_limit=cache_limits(data.cache_limit, prepared.shard_set.manifest)[records[0].split],
        download_attempts=data.download_attempts,
        timeout_seconds=data.timeout_seconds,
    )


def _evaluator(prepared: Prepared, records: list[StreamRecord], *, microbatch: int) -> Evaluator:
    evaluation = prepared.config.evaluation
    per_rank = evaluation.microbatch_packs or (microbatch if prepared.config.microbatch_packs else 1)
    batch_packs = per_rank * world_size()
    batches, num_batches = evaluation_batches(
        [record.packs for record in records], batch_packs=batch_packs, per_stream=evaluation.packs_per_stream
    )
    dataset = open_packs(prepared, records, batches, num_batches, batch_packs)
    return Evaluator(
        label="eval",
        # In the training process: workers of its own would be started anew for each evaluation.
        dataloader=data_spec(dataset, workers=0, timeout_seconds=prepared.config.data.timeout_seconds),
        metric_names=["loss"],
        eval_interval=cb.evaluation_interval(evaluation.interval_steps, last_step=prepared.plan.steps),
    )
