"""The record of a training checkpoint: its name, and its completion mark `complete.json`.

The mark has the run's settings, its progress, and the size and sha256 of each file. It is written last: a checkpoint
without a mark is not complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from streaming_rwkv.config import Config
from streaming_rwkv.model.marked_files import (
    FORMAT,
    LARGEST_COUNT,
    CheckpointError,
    MarkedFile,
    MarkedFiles,
    parse_as,
    read_mark_bytes,
)
from streaming_rwkv.outputs import MARK_NAME

LARGEST_LOG_BYTES = 1 << 33
_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of_name(name: str) -> int | None:
    """Return the step of a checkpoint's name, or None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


class RunIdentity(Config):
    """The settings that decided the steps already taken; a resumed run is compared with each."""

    model_config = ConfigDict(
        extra="allow"
    )  # as newer versions add settings; `check_same_settings` names those that differ

    data: str | None = None
    tokenizer: str | None = None
    mixture: list[dict[str, Any]] = Field(default=[])
    batch_packs: PositiveInt | None = None
    order: dict[str, Any] = Field(default={})
    model: dict[str, Any] = Field(default={})
    optimizer: dict[str, Any] = Field(default={})

    def settings(self) -> dict[str, Any]:
        """Return the settings that are recorded, as JSON values."""
        return self.model_dump(exclude_unset=True)


class Progress(Config):
    """The counts that a run has reached at a step."""

    step: int = Field(ge=0, le=LARGEST_COUNT)
    tokens: int = Field(ge=0, le=LARGEST_COUNT)
    samples: int = Field(ge=0, le=LARGEST_COUNT)
    slots: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    """Missing in marks of an earlier version, where a batch never changed its size."""
    seconds: NonNegativeFloat
    steps_skipped: NonNegativeInt = 0
    gradient_norms: list[NonNegativeFloat] | None = None
    """Of the last steps, if `on_spike` is configured."""
    consumed: dict[str, NonNegativeFloat]
    """Targets trained on, by stream."""
    not_logged: dict[str, tuple[float, NonNegativeFloat]] = Field(default={})
    """The sum of losses and the targets of each stream since its loss was last logged."""


class CompletionMark(MarkedFiles, Progress):
    """The content of a completion mark: the run's settings, its progress, and the checkpoint's files."""

    model_config = ConfigDict(extra="forbid")

    run: RunIdentity

    @model_validator(mode="after")
    def _slots_are_known(self) -> CompletionMark:
        if self.slots is None and self.run.batch_packs is None:
            raise ValueError("`slots`: required, but not given, and `run.batch_packs` is not given either")
        return self

    @property
    def slots_used(self) -> int:
        """Return the number of slots of the plan that the run has used."""
        if self.slots is not None:
            return self.slots
        assert self.run.batch_packs is not None
        return self.step * self.run.batch_packs


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on this machine, with its mark."""

    path: Path
    mark: CompletionMark

    @property
    def step(self) -> int:
        return self.mark.step


def mark_content(*, run: Mapping[str, Any], progress: Progress, files: Mapping[str, MarkedFile]) -> bytes:
    """Return the content of a completion mark.

    Args:
        run: the settings of the run, as JSON values.
    """
    values = {
        "format": FORMAT,
        **progress.model_dump(exclude_none=True),
        "run": run,
        "files": {name: file.model_dump() for name, file in sorted(files.items())},
    }
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def parse_mark(content: bytes, *, where: str) -> CompletionMark:
    """Return a completion mark from its content.

    Raises:
        CheckpointError: not JSON, of another format, or with a field that is missing, unknown or wrong.
    """
    return parse_as(CompletionMark, content, where=where)


def read_mark(folder: Path) -> CompletionMark:
    """Return a checkpoint's completion mark.

    Raises:
        CheckpointError: no mark, not a regular file, or not of this format.
    """
    return parse_mark(read_mark_bytes(folder), where=str(folder / MARK_NAME))


def check_step(mark: CompletionMark, step: int) -> None:
    """Refuse a mark that was copied from the checkpoint of another step.

    Raises:
        CheckpointError: names the mark's step.
    """
    if mark.step != step:
        raise CheckpointError(f"its mark is that of step {mark.step}")
