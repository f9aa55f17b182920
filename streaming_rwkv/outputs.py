"""Places of outputs: none is written among the files of a data set or a checkpoint, nor among its own input."""

from __future__ import annotations

import os
from pathlib import Path

from streaming_rwkv.config import UserError
from streaming_rwkv.location import expand_user, is_remote
from streaming_rwkv.shards import MANIFEST_NAME, TOKENIZER_FOLDER

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, below its save folder and in object storage."""
MARK_NAME = "complete.json"
"""The completion mark of a checkpoint."""


def check_outside(place: str | Path, *, what: str, remedy: str) -> None:
    """Check that an output is not in a data set or a checkpoint, where it would be taken for an unexpected file.

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
    is_data_set = os.path.exists(folder / MANIFEST_NAME) and os.path.isdir(folder / TOKENIZER_FOLDER)
    return "a data set" if is_data_set else None


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
