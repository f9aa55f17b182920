"""Find the checkpoint to resume from or to read, on disk and in object storage, and fetch it where it is missing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from streaming_rwkv.data.mixture import Plan
from streaming_rwkv.distributed import (
    all_gather_object,
    is_local_rank_zero,
    is_rank_zero,
    result_of_rank_zero,
    run_on_all,
    run_on_local_rank_zero,
    run_on_rank_zero,
)
from streaming_rwkv.filesystem import fsync, temporary_path
from streaming_rwkv.location import checked_location, is_remote
from streaming_rwkv.model.marked_files import FORMAT, CheckpointError, check_exists
from streaming_rwkv.model.weights import is_weights_folder
from streaming_rwkv.outputs import CHECKPOINTS, LOGS, RUN_FOLDERS
from streaming_rwkv.shards import LARGEST_FILE_BYTES, TOKENIZER_FOLDER, sha256_of_file
from streaming_rwkv.storage import Store, open_store
from streaming_rwkv.train.checkpoints.local import find_problem, install, newest_checkpoint, replaced_path
from streaming_rwkv.train.checkpoints.record import (
    LARGEST_LOG_BYTES,
    Checkpoint,
    CompletionMark,
    read_mark,
    step_name,
    step_of_name,
)
from streaming_rwkv.train.checkpoints.remote import RemoteCheckpoint, RemoteCheckpoints, newest_remote
from streaming_rwkv.version import PROGRAM

logger = logging.getLogger(__name__)

FETCH_THREADS = 4


# Comparing a checkpoint with a run


def plan_from(plan: Plan, mark: CompletionMark, *, where: str) -> Plan:
    """Return the plan from a checkpoint's step on, where earlier batches may have had another size.

    Raises:
        CheckpointError: the run has taken more steps than the plan has.
    """
    plan = plan.resumed_at(step=mark.step, slots=mark.slots_used)
    if mark.step > plan.steps:
        raise CheckpointError(
            f"{where}: {mark.step} steps were taken, and these settings end after {plan.steps}; train on more tokens"
        )
    return plan


def check_same_run(
    checkpoint: Checkpoint, run: Mapping[str, Any], *, allow: frozenset[str], branching: bool = False
) -> None:
    """Refuse to resume with other data, another mixture or another batch size than the checkpoint was made with.

    Raises:
        CheckpointError: names each key that differs, with both values.
    """
    check_same_settings(checkpoint.mark, run, allow=allow, where=str(checkpoint.path), branching=branching)


def check_same_settings(
    mark: CompletionMark, run: Mapping[str, Any], *, allow: frozenset[str], where: str, branching: bool = False
) -> None:
    """Compare the settings in a completion mark with those of a run.

    Args:
        branching: the run starts from another run's checkpoint; decides the advice in the error.

    Raises:
        CheckpointError: made with a data set of an earlier format, or names each key that differs, with both values.
    """
    if mark.format != FORMAT:
        raise CheckpointError(
            f"{where}: made with a data set of the format streaming-rwkv/1, which can no longer be read; rebuild it "
            f"with `{PROGRAM} prepare RECIPE`, and start a run from these weights in another `save_folder` "
            f"(`model.init_from: {where}`)"
        )
    before, run = (_until(mark.step, settings) for settings in (mark.run.settings(), run))
    differing = [key for key in sorted({*before, *run}) if before.get(key) != run.get(key) and key not in allow]
    if differing:
        lines = [
            f"{key}: the checkpoint has {_short(before.get(key))}, this run {_short(run.get(key))}" for key in differing
        ]
        names = ",".join(differing)
        advice = (
            f"Set the value back, or, if the change is meant, say checkpoint.allow_changed=[{names}]"
            if branching
            else "Give the run another `save_folder`, set the value back, or, if the change is meant, say "
            f"checkpoint.allow_changed=[{names}]"
        )
        raise CheckpointError(
            f"{where}: made by a run with other settings; steps already taken would not be those of this "
            "run.\n  " + "\n  ".join(lines) + f"\n{advice}"
        )


def _until(step: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings as they decided the steps until `step`: steps can still be left out after it."""
    skipped = [[first, min(last, step)] for first, last in run.get("skip_steps", []) if first <= step]
    others = {key: value for key, value in run.items() if key != "skip_steps"}
    return {**others, "skip_steps": skipped} if skipped else others


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}…"


def check_place(store: Store, run: Mapping[str, Any], *, allow: frozenset[str]) -> None:
    """Refuse a store with another run's checkpoint, before anything is changed there. All ranks call this together.

    Two runs in one place would remove each other's checkpoints.

    Raises:
        CheckpointError: settings differ that are not in `allow`.
        StorageError: the store cannot be read.
    """

    def check() -> None:
        try:
            remote = newest_remote(store)
        except CheckpointError:  # `restore` reports damage
            return
        if remote is not None:
            check_same_settings(remote.mark, run, allow=allow, where=store.url(f"{CHECKPOINTS}/{remote.name}"))

    run_on_rank_zero(check)


# Resuming


def restore(store: Store | None, folder: Path) -> tuple[Checkpoint | None, bool]:
    """Bring the newest complete checkpoint of this machine and the store to each node's disk.

    All ranks call this together. Rank 0 chooses: all nodes may share one disk, or each may have its own. A node that
    lacks the chosen checkpoint fetches it. If the store has only an older one, all nodes resume from that.

    Returns:
        The checkpoint, if there is one, and True if the store has it.
    Raises:
        CheckpointError: there are checkpoints on disk or in the store, but none is complete on every node.
        StorageError: the store cannot be read, or sends damaged objects.
    """
    root = folder / CHECKPOINTS

    def choose() -> tuple[int | None, RemoteCheckpoint | None]:
        local, remote, problems = None, None, []
        try:
            local = newest_checkpoint(root)
        except CheckpointError as error:
            problems.append(error)
        if store is not None:
            store.abort_unfinished()
            try:
                remote = newest_remote(store)
            except CheckpointError as error:
                problems.append(error)
        if problems and local is None and remote is None:
            raise problems[0]
        for problem in problems:
            logger.warning("%s; resuming from the other place", problem)
        return local.step if local else None, remote

    step, remote = result_of_rank_zero(choose)
    if step is not None and (remote is None or step > remote.step):
        lacking = _nodes_without(root / step_name(step))
        if not lacking:
            return _local(root, step), False
        if remote is None:
            raise CheckpointError(
                f"{root / step_name(step)}: not complete on every node ({'; '.join(lacking)}); bring the files there, "
                "or move it away on every node to resume from the one before it (with `save_remote`, a node fetches "
                "the files that it lacks)"
            )
        if is_rank_zero():
            logger.warning("going back to step %d: %s (%s)", remote.step, root / step_name(step), "; ".join(lacking))
    if store is None or remote is None:
        return None, False
    if step is None or step < remote.step:  # rank 0 first: the other nodes may see its disk
        run_on_rank_zero(lambda: _fetch(store, remote, folder, logs=LOGS))
    run_on_local_rank_zero(lambda: _fetch(store, remote, folder))
    return _local(root, remote.step), True


def _nodes_without(path: Path) -> list[str]:
    """Return each node on which this checkpoint is not complete, with the reason."""
    problem = find_problem(path) if is_local_rank_zero() else None
    found = all_gather_object(problem and f"{socket.gethostname()}: {problem}")
    return [text for text in found if text is not None]


def _local(root: Path, step: int) -> Checkpoint:
    path = root / step_name(step)
    marks: list[CompletionMark] = []
    run_on_all(lambda: marks.append(read_mark(path)))
    return Checkpoint(path=path, mark=marks[0])


def _fetch(store: Store, remote: RemoteCheckpoint, folder: Path, *, logs: Sequence[str] = ()) -> None:
    """Complete a checkpoint of the store on this disk, and fetch `logs` of its run."""
    final = folder / CHECKPOINTS / remote.name
    if final.exists() and find_problem(final) is None:
        return
    logger.info("fetching %s", store.url(f"{CHECKPOINTS}/{remote.name}"))
    writing = temporary_path(final)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)

    def fetch(name: str) -> None:
        sha256, size = remote.mark.files[name].sha256, remote.mark.files[name].bytes
        if (final / name).is_file() and sha256_of_file(final / name) == sha256:
            os.link(final / name, writing / name)
            return
        store.get_file(f"{CHECKPOINTS}/{remote.name}/{name}", writing / name, most=size, sha256=sha256)
        fsync(writing / name)

    with ThreadPoolExecutor(FETCH_THREADS) as executor:
        list(executor.map(fetch, sorted(remote.mark.files)))
    _fetch_logs(store, folder, logs)
    if final.exists():  # not complete
        final.rename(replaced_path(final))
    install(writing, final, remote.content)


def _fetch_logs(store: Store, folder: Path, logs: Sequence[str]) -> None:
    names = {name for log in logs for name in store.list(log) if _is_log(PurePosixPath(name), name, logs)}
    for name in sorted(names):
        path = PurePosixPath(name)
        if not any(str(parent) in names for parent in path.parents):  # an object, which cannot be a folder here
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            most = LARGEST_FILE_BYTES if path.parts[0] == TOKENIZER_FOLDER else LARGEST_LOG_BYTES
            store.get_file(name, folder / path, most=most)


def _is_log(path: PurePosixPath, name: str, logs: Sequence[str]) -> bool:
    """Return True for a log; consoles of object storage make objects in place of folders, such as `tokenizer/`."""
    return path.parts[0] in logs and ".." not in path.parts and str(path) == name and name not in RUN_FOLDERS


# Reading


def mark_at(location: str | Path) -> CompletionMark:
    """Return the completion mark of a run's newest checkpoint, or of the one at `location`; nothing else is fetched.

    Raises:
        CheckpointError: no complete checkpoint there.
        StorageError: the store cannot be read.
    """
    if not is_remote(location):
        return read_mark(_find_local(Path(location)))
    with _run_of(location) as (store, step):
        return _find(store, step, location).mark


@contextmanager
def local_checkpoint(location: str | Path) -> Iterator[Path]:
    """Yield a local path of a checkpoint. One in object storage is copied, with its run's tokenizer, for the block.

    Args:
        location: a run, locally or on s3://…, for its newest complete checkpoint; one of its checkpoints; or any other
            local path.
    Raises:
        CheckpointError: there is nothing, or no complete checkpoint.
        LocationError: neither a local path nor s3://bucket/prefix.
        StorageError: the store cannot be read, or sends damaged objects.
    """
    if not is_remote(location):
        check_exists(location)
        yield _find_local(Path(location))
        return
    with _run_of(location) as (store, step), TemporaryDirectory(prefix="checkpoint-") as temporary:
        found = _find(store, step, location)
        _fetch(store, found, Path(temporary), logs=[TOKENIZER_FOLDER])
        yield Path(temporary) / CHECKPOINTS / found.name


@contextmanager
def local_run(location: str | Path, *, last: int) -> Iterator[Path]:
    """Yield a folder with a run's newest checkpoints. Those in object storage are copied for the block.

    Args:
        location: the save folder of a run, or its place on s3://….
        last: number of checkpoints to copy.
    Raises:
        CheckpointError: a checkpoint in the store is damaged, or `location` is not a run.
        StorageError: the store cannot be read, or sends damaged objects.
    """
    if not is_remote(location):
        if not (Path(location) / CHECKPOINTS).is_dir():
            raise CheckpointError(f"{location}: not a run: it has no folder {CHECKPOINTS!r}; give a run's save folder")
        yield Path(location)
        return
    with _run_of(location) as (store, _), TemporaryDirectory(prefix="run-") as temporary:
        place = RemoteCheckpoints(store)
        for step in sorted(step for step in place.steps() if not place.is_interrupted(step))[-last:]:
            _fetch(store, _find(store, step, location), Path(temporary), logs=[TOKENIZER_FOLDER])
        yield Path(temporary)


def node_checkpoint(location: str, folder: Path) -> Path:
    """Return a local path of a checkpoint, the same one on every node: see `local_checkpoint`.

    All ranks call this together. A checkpoint in object storage is copied into `folder`, once on each node.
    """
    if not is_remote(location):
        return result_of_rank_zero(lambda: _find_local(Path(location)))
    with _run_of(location) as (store, step):
        found = result_of_rank_zero(lambda: _find(store, step, location))
        run_on_rank_zero(lambda: _fetch(store, found, folder))
        run_on_local_rank_zero(lambda: _fetch(store, found, folder))
    return folder / CHECKPOINTS / found.name


@contextmanager
def _run_of(location: str | Path) -> Iterator[tuple[Store, int | None]]:
    """Yield the store that has a run's checkpoints, and the step of the one that `location` names, if it names one."""
    run = checked_location(location).rstrip("/")
    before, _, last = run.rpartition(f"/{CHECKPOINTS}/")
    step = step_of_name(last) if before else None
    store = open_store(run if step is None else before)
    try:
        yield store, step
    finally:
        store.close()


def _find(store: Store, step: int | None, location: str | Path) -> RemoteCheckpoint:
    place = RemoteCheckpoints(store)
    if step is None:
        found = newest_remote(store)
    else:
        is_there = step in place.steps() and not place.is_interrupted(step)
        try:
            found = place.find(step) if is_there else None
        except CheckpointError as error:
            raise CheckpointError(f"{location}: damaged ({error}); name another checkpoint of this run") from None
    if found is None:
        raise CheckpointError(f"{location}: no checkpoint of a run here; give its `save_remote`")
    return found


def _find_local(path: Path) -> Path:
    """Return the newest complete checkpoint of a run's folder; any other path as it is."""
    if not (path / CHECKPOINTS).is_dir() or is_weights_folder(path):
        return path
    found = newest_checkpoint(path / CHECKPOINTS)
    if found is None:
        raise CheckpointError(
            f"{path}: this run has no finished checkpoint yet; wait for its first, or give other weights"
        )
    return found.path
