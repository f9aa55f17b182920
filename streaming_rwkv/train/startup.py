"""Start of a run: everything that comes before the network is built, on all ranks together."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from composer.devices import Device
from composer.utils import dist, get_device
from torch.distributed import DistNetworkError, DistStoreError

from streaming_rwkv.config import ConfigError
from streaming_rwkv.console import print_rich
from streaming_rwkv.data.shard_set import copy_tokenizer
from streaming_rwkv.distributed import (
    LauncherError,
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
from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.outputs import CHECKPOINTS, CONFIG_NAME
from streaming_rwkv.processes import usable_cores
from streaming_rwkv.remote_outputs import check_run_in_store
from streaming_rwkv.shards import TOKENIZER_FOLDER
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.train.callbacks.tasks import load_tasks
from streaming_rwkv.train.checkpoints.branch import fetch_branch
from streaming_rwkv.train.checkpoints.local import newest_checkpoint
from streaming_rwkv.train.checkpoints.record import Checkpoint, CompletionMark
from streaming_rwkv.train.checkpoints.remote import newest_remote
from streaming_rwkv.train.checkpoints.restore import check_place, check_same_run, node_checkpoint, plan_from, restore
from streaming_rwkv.train.checkpoints.uploader import Mirror
from streaming_rwkv.train.config import RunConfig
from streaming_rwkv.train.memory import check_memory
from streaming_rwkv.train.prepare import PreparedRun, prepare, read_shape
from streaming_rwkv.train.preview import mixture_table
from streaming_rwkv.train.trackers import check_trackers

if TYPE_CHECKING:
    from streaming_rwkv.inference.tasks import Tasks

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Resolved `model.init_from`: the network's shape, and weights unless the run resumes from its own checkpoint."""

    shape: dict[str, Any]
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that passed all start-up checks on every rank."""

    prepared: PreparedRun
    initial: InitialWeights | None
    checkpoint: Checkpoint | None
    mirror: Mirror | None
    device: Device
    timeout_seconds: float  # of a collective
    lock: FolderLock | None  # of the save folder, held by rank 0
    tasks: Tasks | None = None  # of `evaluation.tasks`, on rank 0


def start_up(config: RunConfig) -> CheckedRun | None:
    """Check everything that can stop the run before the network is built; return None if the run is finished already.

    All ranks call it together. The save folder is locked, the data set opened and planned, the newest checkpoint
    found and compared with the configuration.

    Raises:
        UserError: on all ranks, whichever of them met it, so that none waits for the others.
    """
    check_trackers(config.log)
    # Longer than a rank may wait for its data.
    timeout_seconds = max(300.0, 4 * config.data.timeout_seconds)
    device = join_ranks(config.device, timeout_seconds=timeout_seconds)
    save_folder = Path(config.save_folder)
    lock = run_on_rank_zero(
        lambda: lock_folder(save_folder, what="save folder", remedy="give this run its own `save_folder`")
    )
    tasks = run_on_rank_zero(lambda: load_tasks(config.evaluation))
    store = None
    if config.save_remote is not None:
        store = open_store(config.save_remote, timeout_seconds=config.checkpoint.upload_timeout_seconds)
    own = result_of_rank_zero(lambda: newest_mark(save_folder / CHECKPOINTS, store))
    parent = None
    if own is None and config.branch_from is not None:
        parent = fetch_branch(config.branch_from, save_folder, save_remote=config.save_remote)
    mark = parent.mark if parent else own
    initial = find_initial_weights(config.model.init_from, save_folder, mark)
    shape = initial.shape if initial else None
    ranks = world_size()
    prepared = run_on_local_rank_zero_first(
        lambda: check_fits(
            prepare(config, world_size=ranks, fetch=is_local_rank_zero(), shape=shape), device=device.name
        )
    )
    kept = config.checkpoint
    mirror = Mirror(store, save_folder, keep=kept.keep, keep_every=kept.keep_every) if store else None
    prepared, checkpoint = find_resume_point(prepared, store, mirror, parent)
    if checkpoint is not None and checkpoint.step == prepared.plan.steps:
        if checkpoint is parent:
            raise CheckpointError(
                f"branch_from: {config.branch_from}: has taken all {checkpoint.step} steps of these settings; name an "
                "earlier checkpoint, or train on more tokens (checkpoint.allow_changed=[mixture])"
            )
        if mirror:
            mirror.finish()
        print_rich(f"{checkpoint.path}: this run is finished ({checkpoint.step} steps); nothing to do")
        return None
    record_start(prepared, checkpoint, is_branch=checkpoint is not None and checkpoint is parent)
    if mirror:
        mirror.send_logs()
    return CheckedRun(
        prepared=prepared,
        initial=initial,
        checkpoint=checkpoint,
        mirror=mirror,
        device=device,
        timeout_seconds=timeout_seconds,
        lock=lock,
        tasks=tasks,
    )


def check_fits(prepared: PreparedRun, *, device: str) -> PreparedRun:
    """Return the run if it fits into memory here.

    Raises:
        UserError: see `check_memory`.
    """
    check_memory(prepared, processes=world_size(), device=device, is_planned=False)
    return prepared


def join_ranks(device_name: str | None, *, timeout_seconds: float) -> Device:
    """Choose this rank's device, and connect the ranks of the run with each other.

    Raises:
        ConfigError: this machine lacks the device.
        LauncherError: the ranks did not meet in this time.
    """
    # FSDP2's notice that it is experimental: the version is pinned, and resharding is tested.
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental", category=UserWarning)
    # Composer's own use of its attribute.
    warnings.filterwarnings("ignore", message="The _fsdp_wrap attribute will be removed", category=DeprecationWarning)
    check_device(device_name)
    device = get_device(device_name)
    if device.name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each process would use all cores, and they would mostly wait for each other's threads.
        torch.set_num_threads(max(1, usable_cores() // local_world_size()))
    check_threads()
    try:
        with _ended_by_signals():
            dist.initialize_dist(device, timeout=timeout_seconds)
    except (DistNetworkError, DistStoreError) as error:
        place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise LauncherError(
            f"the ranks of this run cannot meet at {place} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}; "
            f"start all of them within {timeout_seconds:.0f} s with the same address, and check the port and firewalls"
        ) from error
    return device


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end this process: Python's handlers do not run while torch waits for the other ranks."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def check_threads(count: int = 8) -> None:
    """Check that this process can start as many threads as gloo does, which waits indefinitely if it cannot.

    Raises:
        RuntimeError: the limit of processes and threads is reached.
    """
    end, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, name="check_threads", daemon=True)
            thread.start()
            started.append(thread)
    finally:
        end.set()
        for thread in started:
            thread.join()


def check_device(device_name: str | None) -> None:
    """Check that this machine has the configured device.

    Raises:
        ConfigError: it has not.
    """
    if device_name == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "device: found gpu, but torch sees no CUDA device; leave it out to train on the CPU, or fix the driver, "
            "or install a torch that is built for it"
        )


def find_initial_weights(location: str | None, save_folder: Path, mark: CompletionMark | None) -> InitialWeights | None:
    """Resolve `model.init_from`, on all ranks together; rank 0 reads the shape for all of them.

    A run that resumes, or branches, from a checkpoint does not need the weights that its first step started from.

    Args:
        mark: completion mark of the checkpoint that the run starts from.
    """
    if location is None:
        return None
    copy = save_folder / "init_from"
    if mark is not None:
        remove_initial_weights(save_folder)
        return InitialWeights(shape=mark.run.model, path=None)
    path = node_checkpoint(location, copy)
    return InitialWeights(shape=result_of_rank_zero(lambda: read_shape(path, where=location)), path=path)


def remove_initial_weights(save_folder: Path) -> None:
    """Remove this node's copy of the weights that `model.init_from` names."""
    if is_local_rank_zero():
        shutil.rmtree(save_folder / "init_from", ignore_errors=True)


def newest_mark(root: Path, store: Store | None) -> CompletionMark | None:
    """Return the completion mark of the checkpoint that the run will resume from, on disk or in object storage.

    Damaged checkpoints are left out here; `restore` reports them.

    Raises:
        UserError: see `check_run_in_store`.
    """
    if store is not None:
        check_run_in_store(store)
    found: list[CompletionMark] = []
    with contextlib.suppress(CheckpointError):
        if (here := newest_checkpoint(root)) is not None:
            found.append(here.mark)
    with contextlib.suppress(CheckpointError):
        if store is not None and (there := newest_remote(store)) is not None:
            found.append(there.mark)
    return max(found, key=lambda mark: mark.step, default=None)


def run_on_local_rank_zero_first(work: Callable[[], Value]) -> Value:
    """Run `work` on local rank 0 of each node, then on the other ranks, and return each rank's result."""
    first = run_on_local_rank_zero(work)
    second = run_on_all(None if is_local_rank_zero() else work)
    result = first if is_local_rank_zero() else second
    assert result is not None
    return result


def find_resume_point(
    prepared: PreparedRun, store: Store | None, mirror: Mirror | None, parent: Checkpoint | None
) -> tuple[PreparedRun, Checkpoint | None]:
    """Return the newest checkpoint, after a check that this run made it, and the plan as it continues from there.

    Args:
        parent: the checkpoint to branch from if the run has none of its own.
    """
    config = prepared.config
    allow = frozenset(config.checkpoint.allow_changed)
    if store and mirror:
        check_place(store, prepared.identity, allow=allow)
        mirror.take_over()  # before the newest checkpoint is looked for: from here on no other run adds one
    checkpoint, in_store = restore(store, Path(config.save_folder))
    own, checkpoint = checkpoint, checkpoint or parent
    if checkpoint is None:
        return prepared, None
    check_same_run(checkpoint, prepared.identity, allow=allow, branching=own is None)
    if mirror and own and not in_store:
        mirror.begin(checkpoint.path, all_on_rank_zero=True)
    return replace(prepared, plan=plan_from(prepared.plan, checkpoint.mark, where=str(checkpoint.path))), checkpoint


def record_start(prepared: PreparedRun, checkpoint: Checkpoint | None, *, is_branch: bool) -> None:
    """Write the tokenizer and the configuration into the save folder, and print the mixture and the number of steps."""
    config, plan = prepared.config, prepared.plan
    save_folder = Path(config.save_folder)
    run_on_rank_zero(lambda: copy_tokenizer(prepared.shard_set, save_folder / TOKENIZER_FOLDER))
    if not is_rank_zero():
        return
    write_atomically(save_folder / CONFIG_NAME, config.to_yaml().encode())
    print_rich(mixture_table(plan, max_repeats=config.data.max_repeats))
    where = f"resuming from {checkpoint.path}" if checkpoint else "starting at step 0"
    if is_branch and checkpoint:
        where = f"branching from {config.branch_from} at step {checkpoint.step}"
    print_rich(f"{plan.steps} steps of {plan.batch_packs} packs, {prepared.total_tokens:,} tokens; {where}")
