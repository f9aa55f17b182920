"""The record of a training checkpoint: its name, and its completion mark `complete.json`.

The mark has the run's settings, its progress, and the size and sha256 of each file. It is written last: a checkpoint
without a mark is not complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from streaming_rwkv.config import Config
from streaming_rwkv.model.marked_files import (
    LARGEST_COUNT,
    MARK_NAME,
    CheckpointError,
    MarkedFiles,
    parse_as,
    read_mark_bytes,
)
from streaming_rwkv.shards import TOKENIZER_FOLDER

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, below its save folder and in object storage."""
LOGS = (
    "config.yaml", "metrics.jsonl", "samples.jsonl", "microbatch.json", "tracking-id", TOKENIZER_FOLDER, "tensorboard"
)  # fmt: skip
"""The files and folders of a save folder, beside its checkpoints, that object storage has too."""
_NAME = re.compile(r"step-(\d{8,})")
_FOR_RESUMING = ("tokens", "samples", "seconds", "consumed")


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of_name(name: str) -> int | None:
    """Return the step of a checkpoint's name, or None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on this machine, with the values of its mark."""

    path: Path
    mark: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.mark["step"])


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


class CompletionMark(MarkedFiles):
    """The content of a completion mark.

    To resume from a checkpoint takes more fields than to read its weights: see `check_resumable`.
    """

    model_config = ConfigDict(extra="forbid")

    step: int = Field(ge=0, le=LARGEST_COUNT)
    tokens: int = Field(default=0, ge=0, le=LARGEST_COUNT)
    samples: int = Field(default=0, ge=0, le=LARGEST_COUNT)
    slots: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    """Missing in marks of an earlier version, where a batch never changed its size."""
    seconds: NonNegativeFloat = 0.0
    steps_skipped: NonNegativeInt = 0
    gradient_norms: list[NonNegativeFloat] = Field(default=[])
    """Of the last steps, if `on_spike` is configured."""
    consumed: dict[str, NonNegativeFloat] = Field(default={})
    run: RunIdentity


def parse_mark(content: bytes, *, where: str) -> dict[str, Any]:
    """Check the content of a completion mark and return its values.

    Raises:
        CheckpointError: not JSON, of another format, or with a field that is missing, unknown or wrong.
    """
    return parse_as(CompletionMark, content, where=where)


def read_mark(folder: Path) -> dict[str, Any]:
    """Return the values of a checkpoint's completion mark.

    Raises:
        CheckpointError: no mark, not a regular file, or not of this format.
    """
    return parse_mark(read_mark_bytes(folder), where=str(folder / MARK_NAME))


def check_step(mark: Mapping[str, Any], step: int) -> None:
    """Refuse a mark that was copied from the checkpoint of another step.

    Raises:
        CheckpointError: names the mark's step.
    """
    if mark["step"] != step:
        raise CheckpointError(f"its mark is that of step {mark['step']}")


def check_resumable(mark: Mapping[str, Any], *, where: str) -> None:
    """Refuse a mark that lacks what a run needs to continue from it.

    Raises:
        CheckpointError: names each field that is missing.
    """
    missing = [name for name in _FOR_RESUMING if name not in mark]
    if "slots" not in mark and "batch_packs" not in mark["run"]:
        missing.append("slots")
    if missing:
        raise CheckpointError(
            f"{where}: its completion mark has no {', '.join(missing)}; a run cannot resume from it: move it away to "
            "resume from the checkpoint before it"
        )
