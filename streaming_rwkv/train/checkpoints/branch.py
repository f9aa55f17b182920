"""Branches: runs that start from a checkpoint of another run, with its moments, step and place in the data.

A branch with the settings of its parent takes the same steps as the parent, to the last bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from streaming_rwkv.distributed import all_gather_object, barrier, is_local_rank_zero, run_on_rank_zero
from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import read_regular_file, write_atomically
from streaming_rwkv.location import is_remote
from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.outputs import CHECKPOINTS, CONFIG_NAME, LARGEST_RECORD_BYTES, MICROBATCH_NAME
from streaming_rwkv.train.checkpoints.local import LocalCheckpoints, find_problem
from streaming_rwkv.train.checkpoints.record import (
    Checkpoint,
    CompletionMark,
    read_mark,
    step_name,
    step_of_name,
)
from streaming_rwkv.train.checkpoints.restore import mark_at, node_checkpoint

COPY = "branch_from"
"""The folder in a save folder that holds a checkpoint of object storage until it is loaded."""


def checkpoint_location(branch_from: str) -> str:
    """Return the location of a checkpoint: `runs/a@step-00010000` → `runs/a/checkpoints/step-00010000`.

    A location without `@step-…` is returned as it is: a run, for its newest checkpoint, or one of its checkpoints.
    """
    run, at, name = branch_from.rpartition("@")
    if not at or step_of_name(name) is None:
        return branch_from
    return f"{run.rstrip('/')}/{CHECKPOINTS}/{name}"


def branch_mark(branch_from: str) -> CompletionMark:
    """Return the completion mark of the checkpoint to branch from; its other files are not fetched.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    location = checkpoint_location(branch_from)
    if not is_remote(location):
        _check_there(Path(location), branch_from)
    return mark_at(location)


def fetch_branch(branch_from: str, save_folder: Path, *, save_remote: str | None) -> Checkpoint:
    """Return the checkpoint to branch from, on each node's disk. All ranks call this together.

    A checkpoint in object storage is copied into the save folder until `remove_copy`.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or missing on a node, or the parent's `save_remote`
            is this run's.
        StorageError: the store cannot be read, or sends damaged objects.
    """
    location = checkpoint_location(branch_from)

    def check() -> None:
        if not is_remote(location):
            _check_there(Path(location), branch_from)

    run_on_rank_zero(check)
    path = node_checkpoint(location, save_folder / COPY)

    def inherit() -> None:
        if not is_remote(location):
            _check_other_remote(path.parent.parent, save_remote)
            _copy_microbatch(path.parent.parent, save_folder)

    run_on_rank_zero(inherit)
    problem = _problem_of(path, branch_from) if is_local_rank_zero() else None
    if problems := [text for text in all_gather_object(problem) if text is not None]:
        raise CheckpointError(problems[0])
    return Checkpoint(path=path, mark=read_mark(path))


def remove_copy(save_folder: Path) -> None:
    """Remove this node's copy of the checkpoint once all ranks have loaded it. All ranks call this together."""
    barrier()
    if is_local_rank_zero():
        shutil.rmtree(save_folder / COPY, ignore_errors=True)


def _check_there(path: Path, branch_from: str) -> None:
    """Refuse a local path that does not exist; the text lists the run's checkpoints."""
    if path.exists():
        return
    steps = sorted(LocalCheckpoints(path.parent).steps())
    found = f"found {', '.join(map(step_name, steps))}" if steps else f"{path.parent} has no checkpoints"
    raise CheckpointError(f"branch_from: {branch_from}: no such checkpoint; {found}")


def _problem_of(path: Path, branch_from: str) -> str | None:
    if step_of_name(path.name) is None:
        return (
            f"branch_from: {branch_from}: not a run's checkpoint, so it has no step and no moments; give "
            "RUN@step-00010000, or start from its weights alone (`model.init_from`)"
        )
    problem = find_problem(path)
    return None if problem is None else f"branch_from: {branch_from}: {problem}; name another checkpoint of that run"


def _check_other_remote(parent: Path, save_remote: str | None) -> None:
    """Refuse the parent's place in object storage, from which this run would resume instead of branching."""
    if save_remote is None:
        return
    try:
        settings = yaml.safe_load(read_regular_file(parent / CONFIG_NAME, most=LARGEST_RECORD_BYTES))
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return  # not written by a run
    of_parent = settings.get("save_remote") if isinstance(settings, dict) else None
    if isinstance(of_parent, str) and of_parent.rstrip("/") == save_remote.rstrip("/"):
        raise CheckpointError(
            f"save_remote: {save_remote} is that of {parent}, whose checkpoints this run would replace; give the "
            "branch another `save_remote`"
        )


def _copy_microbatch(parent: Path, save_folder: Path) -> None:
    """Take over the result of the parent's memory trial, so that the branch rounds like its parent."""
    if (save_folder / MICROBATCH_NAME).exists():
        return
    try:
        record = read_regular_file(parent / MICROBATCH_NAME, most=LARGEST_RECORD_BYTES, follow=False)
    except (FileNotFoundError, NotADirectoryError):
        return  # the parent made no trial
    except UserError as error:
        raise CheckpointError(f"branch_from: {error}") from None
    write_atomically(save_folder / MICROBATCH_NAME, record)
