"""Dry run, `train.py CONFIG --dry-run`: show everything that a run does before its first step, and exit.

A dry run validates the configuration, opens and checks the data, plans the run and reads one batch through the real
loader. It leaves only the save folder and the cache of shards, which the run will use.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from streaming_rwkv.console import print_rich
from streaming_rwkv.data.batch import Batch
from streaming_rwkv.data.loader import data_spec
from streaming_rwkv.data.shard_set import copy_tokenizer
from streaming_rwkv.filesystem import make_folder
from streaming_rwkv.outputs import CHECKPOINTS
from streaming_rwkv.shards import TOKENIZER_FOLDER
from streaming_rwkv.storage import open_store
from streaming_rwkv.tokenizer import Tokenizer
from streaming_rwkv.train.callbacks.tasks import load_tasks
from streaming_rwkv.train.checkpoints.branch import branch_mark
from streaming_rwkv.train.checkpoints.local import newest_checkpoint
from streaming_rwkv.train.checkpoints.restore import check_same_settings, plan_from
from streaming_rwkv.train.config import RunConfig
from streaming_rwkv.train.datasets import open_training_packs
from streaming_rwkv.train.memory import check_memory
from streaming_rwkv.train.prepare import PreparedRun, prepare
from streaming_rwkv.train.preview import batch_table, mixture_table, summary_table
from streaming_rwkv.train.startup import check_device, newest_mark
from streaming_rwkv.train.trackers import check_trackers


def dry_run(config: RunConfig, *, processes: int) -> int:
    """Show what training on `processes` processes would do; return the exit status.

    Raises:
        UserError: an error would stop the run before its first step.
    """
    check_trackers(config.log)
    check_device(config.device)
    load_tasks(config.evaluation)
    make_folder(Path(config.save_folder), what="save folder", remedy="give this run another `save_folder`")
    root = Path(config.save_folder) / CHECKPOINTS
    store = open_store(config.save_remote) if config.save_remote is not None else None
    with contextlib.closing(store) if store else contextlib.nullcontext():
        mark = newest_mark(root, store)
    if mark is None:
        newest_checkpoint(root)  # raises if checkpoints are damaged
    branching = mark is None and config.branch_from is not None
    if branching:
        mark = branch_mark(str(config.branch_from))
    prepared = prepare(config, world_size=processes, fetch=True, shape=mark.run.model if mark else None)
    check_memory(prepared, processes=processes, device=config.device or "gpu", is_planned=True)
    step = 0
    if mark is not None:
        step, where = mark.step, str(config.branch_from) if branching else config.save_folder
        allow = frozenset(config.checkpoint.allow_changed)
        check_same_settings(mark, prepared.identity, allow=allow, where=where, branching=branching)
        prepared = replace(prepared, plan=plan_from(prepared.plan, mark, where=where))
    plan = prepared.plan
    print_rich(mixture_table(plan, max_repeats=config.data.max_repeats))
    print_rich(summary_table(prepared, processes=processes, first_step=step))
    if step == plan.steps:
        print_rich(f"{config.save_folder}: this run is finished ({step} steps); nothing to do")
        return 0
    batch, tokenizer = _read(prepared, step)
    print_rich(batch_table(batch, plan, tokenizer, step=step))
    print_rich("next: the same command without --dry-run")
    return 0


def _read(prepared: PreparedRun, step: int) -> tuple[Batch, Tokenizer]:
    """Return the global batch of `step`, for any number of processes, and the data set's tokenizer."""
    tokenizer = copy_tokenizer(prepared.shard_set, prepared.shard_set.cache / TOKENIZER_FOLDER)
    dataset = open_training_packs(prepared)
    dataset.start_at(step)
    spec = data_spec(dataset, workers=0, timeout_seconds=prepared.config.data.timeout_seconds)
    batch = next(iter(spec.dataloader))
    dataset.close()
    return batch, tokenizer
