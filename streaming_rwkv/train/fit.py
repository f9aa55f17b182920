"""Training of a checked run, from the network to the last checkpoint."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import torch
from composer import Engine, Trainer
from torch.distributed.device_mesh import DeviceMesh

from streaming_rwkv.console import print_rich
from streaming_rwkv.data.steps import StepDataset
from streaming_rwkv.distributed import world_size
from streaming_rwkv.model.flops import peak_flops
from streaming_rwkv.train.callbacks.build import RunCallbacks, build_callbacks
from streaming_rwkv.train.callbacks.checkpointing import Checkpointer
from streaming_rwkv.train.checkpoints.branch import remove_copy
from streaming_rwkv.train.checkpoints.local import load_checkpoint
from streaming_rwkv.train.checkpoints.record import Checkpoint
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.composer_model import RWKV7ForTraining, average_gradients, build_mesh, sharding
from streaming_rwkv.train.datasets import RunDatasets, build_datasets
from streaming_rwkv.train.loggers import RunLoggers, build_loggers, omit_settings, shows_progress_bar
from streaming_rwkv.train.microbatch import choose_microbatch
from streaming_rwkv.train.network import build_model
from streaming_rwkv.train.startup import CheckedRun

STOPPED_EARLY = 143  # 128 + SIGTERM, the exit status that shells and schedulers expect


def fit(run: CheckedRun) -> int:
    """Train to the end, or until asked to stop; return the exit status.

    Raises:
        UserError: a cause outside this program stops the run.
    """
    prepared, config = run.prepared, run.prepared.config
    on_gpu = run.device.name == "gpu"
    precision = config.precision or ("amp_bf16" if on_gpu else "fp32")
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None

    mesh = build_mesh(config.parallel.replicas, device=run.device.name, timeout_seconds=run.timeout_seconds)
    microbatch = choose_microbatch(prepared, precision=precision, device=run.device, mesh=mesh)
    model, optimizer = build_model(run)
    datasets = build_datasets(prepared, microbatch=microbatch)
    callbacks = build_callbacks(
        prepared, mirror=run.mirror, peak_flops=peak * world_size() if peak else None, tasks=run.tasks
    )
    loggers = build_loggers(config, last_step=prepared.plan.steps)
    trainer = build_trainer(
        run, model, optimizer, datasets, callbacks, loggers, precision=precision, microbatch=microbatch, mesh=mesh
    )
    omit_settings(trainer.logger.destinations)
    loggers.log_settings()
    average_gradients(model.network, mesh)
    if run.checkpoint is not None:
        load_checkpoint(run.checkpoint, model=model.network, optimizer=optimizer)
        restore_progress(run.checkpoint, trainer, datasets.train_set, callbacks)
        remove_copy(Path(config.save_folder))
    for log in (loggers.lines, callbacks.samples):
        log.rewind(run.checkpoint.step if run.checkpoint else 0)
    status = train(trainer, callbacks.checkpointer, run.mirror)
    if status == 0:
        loggers.console.print_summary(trainer.state, save_folder=config.save_folder)
    return status


def build_trainer(
    run: CheckedRun,
    model: RWKV7ForTraining,
    optimizer: torch.optim.AdamW,
    datasets: RunDatasets,
    callbacks: RunCallbacks,
    loggers: RunLoggers,
    *,
    precision: str,
    microbatch: int,
    mesh: DeviceMesh | None,
) -> Trainer:
    """Return Composer's trainer of a run, with the network sharded over the mesh if there are several processes."""
    prepared, config = run.prepared, run.prepared.config
    return Trainer(
        run_name=Path(config.save_folder).name,
        model=model,
        train_dataloader=datasets.train_loader,
        eval_dataloader=datasets.evaluators or None,
        max_duration=f"{prepared.plan.steps}ba",
        optimizers=optimizer,
        callbacks=callbacks.all,
        loggers=loggers.all,
        device=run.device,
        precision=precision,
        device_train_microbatch_size=microbatch,
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
        dist_timeout=run.timeout_seconds,
        parallelism_config={"fsdp": sharding(mesh)} if mesh is not None else None,
        progress_bar=shows_progress_bar(config.log),
        spin_dataloaders=False,
        # Composer's own checkpoints and autoresume are not used: see train/checkpoints/.
        save_folder=None,
        autoresume=False,
    )


def restore_progress(checkpoint: Checkpoint, trainer: Trainer, train_set: StepDataset, callbacks: RunCallbacks) -> None:
    """Continue the trainer's clock, the order of packs and the callbacks' counts after a checkpoint's step."""
    mark = checkpoint.mark
    trainer.state.timestamp = trainer.state.timestamp.copy(
        batch=mark.step,
        batch_in_epoch=mark.step,
        sample=mark.samples,
        sample_in_epoch=mark.samples,
        token=mark.tokens,
        token_in_epoch=mark.tokens,
        total_wct=timedelta(seconds=mark.seconds),
    )
    train_set.start_at(checkpoint.step)
    callbacks.consumption.load(mark.consumed, mark.not_logged)
    callbacks.clipping.load(skipped=mark.steps_skipped, norms=mark.gradient_norms or [])


def train(trainer: Trainer, checkpointer: Checkpointer, mirror: Mirror | None) -> int:
    """Run Composer's training loop, finish the uploads, and return the exit status."""
    checkpointer.listen()
    try:
        trainer.fit()
    except BaseException:
        # Callbacks that cannot close for the same reason: the engine would log their stacks.
        logging.getLogger(Engine.__module__).disabled = True
        trainer.engine.close()  # while the exception is pending: trackers then record a failed run
        raise
    steps, last_step = int(trainer.state.timestamp.batch), checkpointer.last_step
    trainer.close()
    if mirror:
        mirror.finish()
    if steps == last_step:
        return 0
    if not checkpointer.stopping:
        raise RuntimeError(f"the loader ended after {steps} of {last_step} steps")
    print_rich(f"stopped at step {steps} of {last_step} on request; rerun the same command to resume")
    return STOPPED_EARLY
