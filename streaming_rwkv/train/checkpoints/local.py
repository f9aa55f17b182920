"""Training checkpoints: written whole or not at all, chosen by their completion mark, read without running code.

    {save_folder}/checkpoints/step-00000500/          weights and optimizer, sharded (torch.distributed.checkpoint)
    {save_folder}/checkpoints/step-00000500/complete.json   written last: what the run was, and each file's sha256
    {save_folder}/checkpoints/.step-00000750.tmp/     an interrupted write; never read, removed by the next write

A folder gets its name by a rename after its mark was written, so there is no moment at which half a checkpoint looks
whole. A folder with a checkpoint's name that is not whole is damage, and stops the run: starting afresh beside it, or
from an older one, has to be decided by a person.

Only tensors are kept in the sharded files, and everything else in the mark as JSON. The one pickle left, the index of
the sharded files, goes through an unpickler that knows its few classes (`model.sharded`).
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.fsdp import FSDPModule

from streaming_rwkv.data.mixture import Plan
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
from streaming_rwkv.model.completion_mark import FORMAT, MARK_NAME, find_file_problem
from streaming_rwkv.model.completion_mark import parse_mark as parse_mark
from streaming_rwkv.model.completion_mark import read_mark as read_mark
from streaming_rwkv.model.sharded import INDEX_NAME, SafeReader
from streaming_rwkv.model.weights import CheckpointError
from streaming_rwkv.shards import sha256_of_file

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint and what its mark says."""

    path: Path
    mark: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.mark["step"])


def plan_from(plan: Plan, mark: Mapping[str, Any], *, where: str) -> Plan:
    """The plan from a checkpoint's step on, where batches before it may have had another size.

    Raises:
        CheckpointError: the run is longer than the plan.
    """
    slots = mark.get("slots", mark["step"] * mark["run"]["batch_packs"])  # as it was before batches could change
    plan = plan.resumed_at(step=mark["step"], slots=slots)
    if mark["step"] > plan.steps:
        raise CheckpointError(
            f"{where}: {mark['step']} steps were taken, and these settings end after {plan.steps}; train on more tokens"
        )
    return plan


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint below `root`, or None where none was ever finished.

    Raises:
        CheckpointError: there are checkpoints, but the newest of them, or all, are damaged.
    """
    found = sorted((path for path in root.glob("step-*") if NAME.fullmatch(path.name)), reverse=True)
    problems: list[str] = []
    for path in found:
        problem = find_problem(path)
        if problem is None:
            if problems:
                logger.warning("going back to %s: %s", path, "; ".join(problems))
            return Checkpoint(path=path, mark=read_mark(path))
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise CheckpointError(
            f"{root}: no checkpoint here is whole ({'; '.join(problems)}); restore one, or move the folder away to "
            "start the run again from its beginning"
        )
    return None


def find_problem(path: Path) -> str | None:
    """What is missing or of another size than its mark says, or None; contents are compared when they are read."""
    try:
        mark = read_mark(path)
    except CheckpointError as error:
        return str(error)
    problems = (find_file_problem(path / name, record) for name, record in mark["files"].items())
    return next((problem for problem in problems if problem is not None), None)


def check_same_run(checkpoint: Checkpoint, run: Mapping[str, Any], *, allow: frozenset[str]) -> None:
    """Refuse to go on with other data, another mixture or batch size than the checkpoint was made with.

    Raises:
        CheckpointError: names each key that differs, with both values.
    """
    check_same_settings(checkpoint.mark, run, allow=allow, where=str(checkpoint.path))


def check_same_settings(mark: Mapping[str, Any], run: Mapping[str, Any], *, allow: frozenset[str], where: str) -> None:
    """Likewise, of a checkpoint's mark alone."""
    before = mark["run"]
    differing = [key for key in sorted({*before, *run}) if before.get(key) != run.get(key) and key not in allow]
    if differing:
        lines = [
            f"{key}: the checkpoint has {_short(before.get(key))}, this run {_short(run.get(key))}" for key in differing
        ]
        raise CheckpointError(
            f"{where}: made by a run with other settings; steps already taken would not be those of this "
            "run.\n  " + "\n  ".join(lines) + "\nGive the run another `save_folder`, set the value back, or, if the "
            f"change is meant, say checkpoint.allow_changed=[{','.join(differing)}]"
        )


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}…"


def save_checkpoint(
    root: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, mark: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint with all ranks together, then keep the `keep` newest on disk (0: all).

    Args:
        mark: what the completion mark shall carry beside the files: JSON values.
    """
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
    # Each rank vouches for the files that it wrote, which no other may be able to see.
    written = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(writing.iterdir())
        if wrote(path.name)
    }
    files = {name: record for part in all_gather_object(written) for name, record in part.items()}
    content = json.dumps(
        {"format": FORMAT, "step": step, **mark, "files": dict(sorted(files.items()))}, indent=1, ensure_ascii=False
    )
    content = broadcast_object(content)  # times differ by a little
    if is_rank_zero():
        _complete(writing, final, content.encode(), keep=keep, step=step)
    barrier()
    if own_disk:  # asked once: of what another node has just renamed, NFS may still say that it is there
        _complete(writing, final, content.encode(), keep=keep, step=step)
    barrier()
    return final


def wrote(name: str) -> bool:
    """Whether this rank writes the checkpoint file `name`: torch puts the rank into its name; the index is rank 0's."""
    number = re.match(r"__(\d+)_", name)
    return int(number[1]) == rank() if number else is_rank_zero()


def _make_room(final: Path, writing: Path) -> None:
    if final.exists():  # damaged, or this step would not be written again
        final.rename(replaced_path(final))
    for left_over in final.parent.glob(f".step-*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(left_over)
    writing.mkdir(parents=True)


def replaced_path(path: Path) -> Path:
    """Return the name that a damaged checkpoint has from when it is replaced until it is removed."""
    return temporary_path(path.with_name(f"{path.name}.replaced"))


def _complete(writing: Path, final: Path, content: bytes, *, keep: int, step: int) -> None:
    install(writing, final, content)
    prune(final.parent, keep=keep, last_step=step)


def install(writing: Path, final: Path, mark: bytes) -> None:
    """Give the files in `writing`, which are on the disk, their completion mark and their name."""
    write_atomically(writing / MARK_NAME, mark)
    rename_durably(writing, final)


def prune(root: Path, *, keep: int, last_step: int) -> None:
    """Remove all but the `keep` newest checkpoints up to `last_step`, whichever start of the run wrote them.

    One of a later step is damaged, or the run would have gone on from it: it must not take the place of a whole one.
    """
    if keep <= 0:
        return
    found = sorted((int(name[1]), path) for path in root.glob("step-*") if (name := NAME.fullmatch(path.name)))
    for _, path in [(step, path) for step, path in found if step <= last_step][:-keep]:
        # Renamed first: killed in between, this must not leave a checkpoint with files missing.
        leaving = temporary_path(path)
        path.rename(leaving)
        shutil.rmtree(leaving)


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
    except CheckpointException as error:  # torch's own, which is no Exception
        reason = next(iter(error.failures.values()), (error, None))[0]
        raise CheckpointError(
            f"{checkpoint.path}: damaged ({type(reason).__name__}: {str(reason).partition(chr(10))[0]}); delete it to "
            "resume from the one before"
        ) from None
    # The weights were filled in place; the moments may be tensors that `_tensors` has just made.
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = state["optimizer"][name]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Weights and AdamW's moments by parameter name; moments are made where the optimizer has not stepped yet."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward pass without a backward (an evaluation) leaves the root's parameters gathered; those are other
            # tensors than the optimizer's, and would be saved without their moments.
            module.reshard()
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
    """Each rank compares its part of the files, together they compare all; what one finds, all refuse."""
    mine = sorted(checkpoint.mark["files"].items())[rank() :: world_size()]
    changed = (name for name, record in mine if sha256_of_file(checkpoint.path / name) != record["sha256"])
    found = [name for name in all_gather_object(next(changed, None)) if name is not None]
    if found:
        raise CheckpointError(
            f"{checkpoint.path / found[0]}: its content is not what was written; move {checkpoint.path} away to go on "
            "from the checkpoint before it"
        )


def _check_shapes(metadata: Metadata, state: dict[str, dict[str, Any]], path: Path) -> None:
    # Each as a tensor: what the index calls anything else, torch would unpickle, and run what is in it.
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
    """Without torch's warnings of what is meant (one process alone) and of its own use of TypedStorage."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        yield
