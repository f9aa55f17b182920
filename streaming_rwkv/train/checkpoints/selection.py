"""Selection of the newest checkpoint and of those to remove, the same on a disk and in object storage."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol, TypeVar

from streaming_rwkv.model.marked_files import CheckpointError
from streaming_rwkv.train.checkpoints.record import step_name

logger = logging.getLogger(__name__)

FoundT = TypeVar("FoundT", covariant=True)


class CheckpointPlace(Protocol[FoundT]):
    """The checkpoints of one run in one place; `local.LocalCheckpoints` and `remote.RemoteCheckpoints` have it."""

    @property
    def location(self) -> str:
        """The folder or URL, for errors."""

    @property
    def remedy(self) -> str:
        """The advice for a place in which every checkpoint is damaged."""

    def steps(self) -> Collection[int]:
        """Return the steps of all folders that have a checkpoint's name, complete or not.

        Raises:
            CheckpointError: the folder cannot be read.
        """

    def has_mark(self, step: int) -> bool:
        """Return True if the checkpoint has a completion mark, whatever the mark says."""

    def is_interrupted(self, step: int) -> bool:
        """Return True for a checkpoint that was never complete; without a mark, any other is damaged."""

    def find(self, step: int) -> FoundT:
        """Return a complete checkpoint.

        Raises:
            CheckpointError: no mark, a mark that cannot be relied on, or a file that is missing or of another size. The
                text does not name the checkpoint.
        """

    def remove(self, step: int) -> None:
        """Remove a checkpoint so that a kill on the way leaves nothing that looks complete."""


def newest(place: CheckpointPlace[FoundT]) -> FoundT | None:
    """Return the newest complete checkpoint, or None where none was ever finished; damaged ones are skipped.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    problems: list[str] = []
    for step in sorted(place.steps(), reverse=True):
        if place.is_interrupted(step):
            continue
        try:
            found = place.find(step)
        except CheckpointError as error:
            problems.append(f"{step_name(step)}: {error}")
            continue
        if problems:
            logger.warning("%s: going back to %s: %s", place.location, step_name(step), "; ".join(problems))
        return found
    if problems:
        raise CheckpointError(f"{place.location}: no checkpoint here is whole ({'; '.join(problems)}); {place.remedy}")
    return None


def prune(place: CheckpointPlace[object], *, keep: int, last_step: int, keep_every: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints up to `last_step`, and interrupted ones before it.

    A checkpoint of a later step is damaged, or the run would have resumed from it: a person has to look at it.

    Args:
        keep: 0 keeps all.
        keep_every: the checkpoints of steps that are multiples of it are kept too.
    """
    steps = sorted(step for step in place.steps() if step <= last_step)
    marked = [step for step in steps if place.has_mark(step)]
    kept = {last_step, *marked[-keep:]}
    if keep_every is not None:
        kept |= {step for step in marked if step % keep_every == 0}
    for step in steps:
        if step not in kept and (keep or place.is_interrupted(step)):
            place.remove(step)
