"""The work folder of a build: what earlier starts left in it, and what is kept of that.

{work}/done/units/{unit}/        a finished task of each unit; other stages have folders beside it
{work}/done/audited/{unit}/      an empty folder for each unit whose sample was compared with the reference
{work}/by-reference              exists from when the fast tokenizer was found to differ to the end of the build
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prep.config import PrepConfig
from prep.execution.context import UNITS_FOLDER, BuildContext, unit_task
from prep.execution.task_store import (
    DONE_FOLDER,
    TEMPORARY_FOLDER,
    WorkError,
    done_folder,
)
from prep.inputs.files import Unit
from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import atomic_folder, check_no_links, write_atomically
from streaming_rwkv.location import expand_user, is_remote
from streaming_rwkv.outputs import check_outside
from streaming_rwkv.shards import SPLITS, TOKENIZER_FOLDER
from streaming_rwkv.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_AUDITED_FOLDER = "audited"
_BY_REFERENCE_NAME = "by-reference"


def check_folder(config: PrepConfig) -> None:
    """Check that a build may write to its folder.

    Raises:
        WorkError: a source reads it: its input would change with each start.
        UserError: it is in another data set, or in a checkpoint, or holds an unfinished build with links, by which this
            one would write and delete elsewhere.
    """
    remedy = f"choose another `{'work' if is_remote(config.out) else 'out'}=`"
    check_outside(config.folder.absolute().parent, what="data set", remedy=remedy)
    for source, source_config in config.sources.items():
        for path in source_config.paths:
            folder = expand_user(path)
            if not is_remote(path) and folder.is_dir() and config.folder.resolve().is_relative_to(folder.resolve()):
                raise WorkError(f"{config.folder}: is inside {path}, which sources.{source} reads; {remedy}")
    own = [config.work_folder, *(config.folder / name for name in (*SPLITS, TOKENIZER_FOLDER))]
    check_no_links(own, remedy=f"remove it, or {remedy}")


def save_tokenizer(tokenizer: Tokenizer, context: BuildContext) -> None:
    """Save the tokenizer in the data set, from where workers load it; one that is there already stays."""
    folder = context.folder / TOKENIZER_FOLDER
    try:
        if load_tokenizer(folder).record() == tokenizer.record():
            return
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder, within=context.work_folder / TEMPORARY_FOLDER) as temporary:
        tokenizer.save(temporary)


def mark_audited(context: BuildContext, unit: Unit) -> None:
    """Note that the unit's sample was compared with the reference and found equal."""
    _audited_folder(context, unit).mkdir(parents=True, exist_ok=True)


def discard_unaudited(context: BuildContext) -> None:
    """Remove the work on units whose sample a killed start did not compare.

    Such a unit is tokenized again, so that a kill cannot hide a difference between fast tokenizer and reference.
    """
    for unit in context.units:
        if context.audit_bytes(unit) and not _audited_folder(context, unit).exists():
            shutil.rmtree(done_folder(context.work_folder, unit_task(unit)), ignore_errors=True)


def _audited_folder(context: BuildContext, unit: Unit) -> Path:
    return done_folder(context.work_folder, f"{_AUDITED_FOLDER}/{unit.name}")


def uses_reference(work_folder: Path) -> bool:
    """Return whether an earlier start of this build has found the fast tokenizer to differ from its reference."""
    return (work_folder / _BY_REFERENCE_NAME).exists()


def switch_to_reference(context: BuildContext, reason: str) -> BuildContext:
    """Remove all finished work, and have this start and later ones encode with the reference."""
    shutil.rmtree(context.work_folder / DONE_FOLDER, ignore_errors=True)
    write_atomically(context.work_folder / _BY_REFERENCE_NAME, reason.encode())
    return replace(context, by_reference=True)


def keep_units_only(context: BuildContext, changes: Sequence[str]) -> BuildContext:
    """Remove the work of a build with other input, except for the units that this build has too.

    Work with the reference tokenizer is removed as a whole: on other input the fast tokenizer may not differ from it.
    """
    logger.warning("%s: resumes with changed input:\n  %s", context.config.out, "\n  ".join(changes))
    for split in SPLITS:
        shutil.rmtree(context.folder / split, ignore_errors=True)
    if context.by_reference:
        shutil.rmtree(context.work_folder / DONE_FOLDER, ignore_errors=True)
        (context.work_folder / _BY_REFERENCE_NAME).unlink()
        return replace(context, by_reference=False)
    units = {unit.name for unit in context.units}
    for folder in done_folder(context.work_folder, "").glob("*"):
        for task in folder.iterdir() if folder.name in (UNITS_FOLDER, _AUDITED_FOLDER) else [folder]:
            if task.name not in units:
                shutil.rmtree(task)
    return context


def has_finished_work(work_folder: Path) -> bool:
    """Return whether finished tasks are left, as after a kill between the manifest and the end of the build."""
    return (work_folder / DONE_FOLDER).exists()


def clear_work(config: PrepConfig, *, published: Sequence[str]) -> None:
    """Remove what a finished build needs no more: its tasks, and a remote data set's files in the local folder.

    The state of the build stays, so that the next start finds that there is nothing left to do.

    Args:
        published: names of the files, besides shards and tokenizer, that were uploaded from the local folder.
    """
    if is_remote(config.out):
        for name in (*SPLITS, TOKENIZER_FOLDER):
            shutil.rmtree(config.folder / name, ignore_errors=True)
        for name in published:
            (config.folder / name).unlink(missing_ok=True)
    (config.work_folder / _BY_REFERENCE_NAME).unlink(missing_ok=True)
    for folder in (TEMPORARY_FOLDER, DONE_FOLDER):  # DONE_FOLDER last: it shows that there is something to clear
        shutil.rmtree(config.work_folder / folder, ignore_errors=True)
