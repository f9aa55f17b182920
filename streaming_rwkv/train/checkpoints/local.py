"""Training checkpoints on disk: written completely or not at all, and read without running code from them.

    {save_folder}/checkpoints/step-00000500/          weights and optimizer, sharded (torch.distributed.checkpoint)
    {save_folder}/checkpoints/step-00000500/complete.json   the completion mark, written last: see `record`
    {save_folder}/checkpoints/.step-00000750.tmp/     an interrupted write; never read, removed by the next write

A folder is renamed to its final name after its mark was written, so half a checkpoint never looks complete. A folder
with a checkpoint's name that is not complete is damaged, and the run resumes from the one before it. If all are
damaged, the run stops, and a person has to decide.

The sharded files contain only tensors; everything else is JSON in the mark. The one remaining pickle, the index of the
sharded files, is read by an unpickler that accepts only its few classes (`model.sharded`).
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from streaming_rwkv.distributed import (
    all_gather_object,
    barrier,
    broadcast_object,
    is_distributed,
    is_local_rank_zero,
    is_rank_zero,
    rank,
    world_size,
)
from streaming_rwkv.filesystem import TEMPORARY_SUFFIX, rename_durably, temporary_path, write_atomically
from streaming_rwkv.model.marked_files import CheckpointError, MarkedFile, find_file_problem, unreadable
from streaming_rwkv.model.sharded import SafeReader, cause_of
from streaming_rwkv.model.sharded_index import INDEX_NAME
from streaming_rwkv.model.sharding import release_weights
from streaming_rwkv.outputs import MARK_NAME
from streaming_rwkv.shards import sha256_of_file
from streaming_rwkv.train.checkpoints.record import (
    Checkpoint,
    Progress,
    check_step,
    mark_content,
    read_mark,
    step_name,
    step_of_name,
)
from streaming_rwkv.train.checkpoints.selection import newest, prune


class LocalCheckpoints:
    """The checkpoints in a folder: a `CheckpointPlace`."""

    remedy = "restore one, or move the folder away to start the run again from its beginning"

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def location(self) -> str:
        return str(self.root)

    def steps(self) -> list[int]:
        try:
            names = os.listdir(self.root)  # a glob would be silent about a folder that cannot be read
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise unreadable(self.root, error) from None
        return [step for name in names if (step := step_of_name(name)) is not None]

    def has_mark(self, step: int) -> bool:
        return (self.root / step_name(step) / MARK_NAME).is_file()

    def is_interrupted(self, step: int) -> bool:
        return False  # an interrupted write has a temporary name

    def find(self, step: int) -> Checkpoint:
        path = self.root / step_name(step)
        mark = read_mark(path)
        check_step(mark, step)
        problems = (find_file_problem(path / name, record) for name, record in mark.files.items())
        if (problem := next((problem for problem in problems if problem is not None), None)) is not None:
            raise CheckpointError(problem)
        return Checkpoint(path=path, mark=mark)

    def remove(self, step: int) -> None:
        path = self.root / step_name(step)
        leaving = temporary_path(path)  # renamed first, so that a kill leaves no checkpoint with files missing
        path.rename(leaving)
        _remove(leaving)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint in a folder: see `selection.newest`."""
    return newest(LocalCheckpoints(root))


def find_problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's mark or the sizes of its files, or None; contents are not read."""
    step = step_of_name(path.name)
    assert step is not None, path
    try:
        LocalCheckpoints(path.parent).find(step)
    except CheckpointError as error:
        return str(error)
    return None


def save_checkpoint(
    root: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    run: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write a checkpoint with all ranks together, then keep the `keep` newest on disk (0: all).

    Args:
        run: the settings of the run, as JSON values.
        keep_every: the checkpoints of steps that are multiples of it stay on disk too.
    """
    step = progress.step
    final, writing = root / step_name(step), temporary_path(root / step_name(step))
    if is_rank_zero():
        _make_room(final, writing)
    barrier()
    own_disk = is_local_rank_zero() and not is_rank_zero() and not writing.exists()
    if own_disk:
        _make_room(final, writing)
    barrier()
    writer = FileSystemWriter(writing, sync_files=True)
    with _quiet_torch():
        save_sharded(_tensors(model, optimizer), storage_writer=writer, no_dist=not is_distributed())
    # Each rank hashes the files that it wrote: the others may not be able to see them.
    written = {
        path.name: MarkedFile(bytes=path.stat().st_size, sha256=sha256_of_file(path))
        for path in sorted(writing.iterdir())
        if wrote(path.name)
    }
    files = {name: record for part in all_gather_object(written) for name, record in part.items()}
    # Rank 0's mark for all: each rank measures slightly different times.
    content = broadcast_object(mark_content(run=run, progress=progress, files=files))
    if is_rank_zero():
        install(writing, final, content)
        prune(LocalCheckpoints(root), keep=keep, last_step=step, keep_every=keep_every)
    barrier()
    if own_disk:  # decided once above: NFS may still show a folder that another node has just renamed
        install(writing, final, content)
        prune(LocalCheckpoints(root), keep=keep, last_step=step, keep_every=keep_every)
    barrier()
    return final


def wrote(name: str) -> bool:
    """Return True if this rank writes the file `name`: torch's names contain the rank, and rank 0 writes the index."""
    number = re.match(r"__(\d+)_", name)
    return int(number[1]) == rank() if number else is_rank_zero()


def _make_room(final: Path, writing: Path) -> None:
    if final.exists():  # it is damaged, or this step would not be written again
        final.rename(replaced_path(final))
    for left_over in final.parent.glob(f".step-*{TEMPORARY_SUFFIX}"):
        _remove(left_over)
    writing.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a folder, or what else has its name; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replaced_path(path: Path) -> Path:
    """Return the name that a damaged checkpoint has from when it is replaced until it is removed."""
    return temporary_path(path.with_name(f"{path.name}.replaced"))


def install(writing: Path, final: Path, mark: bytes) -> None:
    """Complete a checkpoint whose files are on the disk in `writing`: write its mark, and rename it."""
    write_atomically(writing / MARK_NAME, mark)
    rename_durably(writing, final)


def load_checkpoint(checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer with the checkpoint's tensors, resharding where the world has another size.

    Raises:
        CheckpointError: a file does not have its hash, or the tensors are not those of this model.
    """
    _check_hashes(checkpoint)
    state = _tensors(model, optimizer)
    reader = SafeReader(checkpoint.path)
    try:
        metadata = reader.read_metadata()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/{INDEX_NAME}: refused ({error}); it was not written by torch, or is damaged"
        ) from None
    _check_shapes(metadata, state, checkpoint.path)
    try:
        with _quiet_torch():
            load_sharded(state, storage_reader=reader, no_dist=not is_distributed())
    except CheckpointException as error:  # a BaseException of torch
        raise CheckpointError(
            f"{checkpoint.path}: damaged ({cause_of(error)[1]}); delete it to resume from the one before"
        ) from None
    # The weights were filled in place, but the moments may be new tensors made by `_tensors`.
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = state["optimizer"][name]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return weights and AdamW's moments by parameter name; the moments are new before the optimizer's first step."""
    # After an evaluation the root's parameters are gathered. Those are not the optimizer's tensors, and would be saved
    # without their moments.
    release_weights(model)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter) or {}
        assert bool(state) == bool(optimizer.state), f"{name}: the optimizer knows other parameters, but not this one"
        moments[name] = {
            "step": state.get("step", torch.zeros((), dtype=torch.float32)),
            "exp_avg": state.get("exp_avg", torch.zeros_like(parameter.detach())),
            "exp_avg_sq": state.get("exp_avg_sq", torch.zeros_like(parameter.detach())),
        }
    return {"model": {name: parameter.detach() for name, parameter in model.named_parameters()}, "optimizer": moments}


def _check_hashes(checkpoint: Checkpoint) -> None:
    """Compare all files with their hashes, each rank a part of them; every rank raises the error that one finds."""
    mine = sorted(checkpoint.mark.files.items())[rank() :: world_size()]
    changed = (name for name, record in mine if sha256_of_file(checkpoint.path / name) != record.sha256)
    found = [name for name in all_gather_object(next(changed, None)) if name is not None]
    if found:
        raise CheckpointError(
            f"{checkpoint.path / found[0]}: its content is not what was written; move {checkpoint.path} away to "
            "resume from the checkpoint before it"
        )


def _check_shapes(metadata: Metadata, state: dict[str, dict[str, Any]], path: Path) -> None:
    # Every entry must be a tensor: torch would unpickle any other entry, and run code from it.
    moments = {f"{name}.{moment}": x for name, of_one in state["optimizer"].items() for moment, x in of_one.items()}
    wanted = {f"model.{name}": tuple(tensor.shape) for name, tensor in state["model"].items()}
    wanted |= {f"optimizer.{name}": tuple(tensor.shape) for name, tensor in moments.items()}
    found = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            raise CheckpointError(
                f"{path}: {key} is {found.get(key, 'missing')} in the checkpoint and {wanted.get(key, 'missing')} in "
                "this model; the `model:` section differs"
            )


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence torch's warnings about a single process, which is meant, and about its own use of TypedStorage."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        yield
