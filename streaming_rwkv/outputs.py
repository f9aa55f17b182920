"""Places of outputs: none is written among the files of a data set, a checkpoint or a run, nor among its own input."""

from __future__ import annotations

import os
from pathlib import Path

from streaming_rwkv.config import UserError
from streaming_rwkv.filesystem import LOCK_NAME, check_no_links
from streaming_rwkv.location import expand_user, is_remote
from streaming_rwkv.shards import MANIFEST_NAME, TOKENIZER_FOLDER

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, below its save folder and in object storage."""
MARK_NAME = "complete.json"
"""The completion mark of a checkpoint."""
CONFIG_NAME = "config.yaml"
"""The configuration of a run, in its save folder."""
MICROBATCH_NAME = "microbatch.json"
"""The result of a run's memory trial, in its save folder."""
LARGEST_RECORD_BYTES = 1 << 20
"""The most bytes of either."""
LOGS = (
    CONFIG_NAME, "metrics.jsonl", "samples.jsonl", MICROBATCH_NAME, "tracking-id", TOKENIZER_FOLDER, "tensorboard"
)  # fmt: skip
"""The files and folders of a save folder, beside its checkpoints, that object storage has too."""
WRITER = "writer.json"
"""The claim of the run that writes to a place in object storage."""
LARGEST_WRITER_BYTES = 1 << 12
RUN_FOLDERS = (CHECKPOINTS, TOKENIZER_FOLDER, "tensorboard", "profile", "init_from", "branch_from")
"""The folders of a save folder that are a run's alone."""
CACHE = "cache"
"""The folder of a save folder for the shards that a run has fetched, unless it names another."""


def check_outside(place: str | Path, *, what: str, remedy: str) -> None:
    """Check that an output is not in a data set, a checkpoint or a folder that a run keeps for itself.

    Args:
        place: the file or folder to write.
        what: the output, as in `data cache`.
        remedy: advice that names the setting, as in "name another with `--cache FOLDER`".
    Raises:
        UserError: it is in one, at any depth.
    """
    real = Path(os.path.realpath(place))
    for folder in (real, *real.parents):
        kind = _kind(folder)
        if kind is not None:
            raise UserError(f"{place}: this {what} would be in {folder}, which is {kind}; {remedy}")


def _kind(folder: Path) -> str | None:
    if os.path.exists(folder / MARK_NAME):
        return "a checkpoint"
    # The cache of shards has a manifest, too.
    if os.path.exists(folder / MANIFEST_NAME) and os.path.isdir(folder / TOKENIZER_FOLDER):
        return "a data set"
    return f"part of the run in {folder.parent}" if folder.name in RUN_FOLDERS and _is_run(folder.parent) else None


def _is_run(folder: Path) -> bool:
    """Return True for the save folder of a run; one that ended before its first checkpoint has a lock all the same."""
    return os.path.isdir(folder / CHECKPOINTS) or all(
        os.path.exists(folder / name) for name in (LOCK_NAME, CONFIG_NAME)
    )


def check_save_folder(folder: str | Path) -> None:
    """Check that a run may write its files into a folder: a new or its earlier one, or one with other files.

    Raises:
        UserError: it is a data cache, is in a data set, a checkpoint or another run, has files of other programs that
            the run would replace, or links by which the run would write and delete elsewhere.
    """
    remedy = "give this run another `save_folder`"
    check_outside(folder, what="save folder", remedy=remedy)
    real = Path(os.path.realpath(folder))
    if os.path.exists(real / MANIFEST_NAME):
        raise UserError(f"{folder}: has a {MANIFEST_NAME}, as a data set or a data cache; {remedy}")
    if _is_run(real) or os.path.exists(real / LOCK_NAME):
        # Trackers have links of their own beside these.
        own = [Path(folder) / name for name in dict.fromkeys((*LOGS, *RUN_FOLDERS, CACHE))]
        check_no_links(own, remedy="replace it by what it points to, or give this run another `save_folder`")
        return
    check_no_links([Path(folder) / CACHE], remedy="replace it by what it points to, or set `data.cache`")
    if replaced := [name for name in (*LOGS, *RUN_FOLDERS) if os.path.lexists(real / name)]:
        raise UserError(
            f"{folder}: has {', '.join(dict.fromkeys(replaced))}, but not from a run, which would write files of these "
            f"names; {remedy}, or move them away"
        )


def check_apart(output: str | Path, source: str | Path, *, remedy: str) -> None:
    """Check that neither an output nor its input is in the other; an input in object storage is in no folder.

    Raises:
        UserError: one is in the other, or both are the same.
    """
    if is_remote(source):
        return
    to, of = (Path(os.path.realpath(path)) for path in (output, expand_user(source)))
    if to.is_relative_to(of) or of.is_relative_to(to):
        where = "is the input" if to == of else f"is inside {source}" if to.is_relative_to(of) else f"contains {source}"
        raise UserError(f"{output}: {where}, expected a folder apart from the input; {remedy}")
