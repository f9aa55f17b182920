"""The completion mark of a training checkpoint, `complete.json`: the files it vouches for, and how the run went on.

A mark may come from anywhere: a copied folder, a bucket. Every reader gets it through `parse_mark`.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from streaming_rwkv.config import Config, ConfigError, UserError, validate
from streaming_rwkv.shards import sha256_of_file

FORMAT = "streaming-rwkv-checkpoint/1"
MARK_NAME = "complete.json"  # our training writes one beside its shards, with the sha256 of each
LARGEST_MARK_BYTES = 1 << 26
_LARGEST_COUNT = 1 << 62


class CheckpointError(UserError):
    """A checkpoint that cannot be read, is no RWKV-7 model, or does not fit the model it is to be loaded into."""


class MarkedFile(Config):
    """Size and hash of one file."""

    bytes: int = Field(ge=0, le=_LARGEST_COUNT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


_FOR_RESUMING = ("tokens", "samples", "seconds", "consumed")


class RunIdentity(Config):
    """The settings that decided the steps already taken."""

    model_config = ConfigDict(extra="allow")  # `check_same_settings` names those that differ

    data: str | None = None
    tokenizer: str | None = None
    mixture: list[dict[str, Any]] = Field(default=[])
    batch_packs: PositiveInt | None = None
    order: dict[str, Any] = Field(default={})
    model: dict[str, Any] = Field(default={})
    optimizer: dict[str, Any] = Field(default={})


class CompletionMark(Config):
    """What a completion mark may hold; to resume from it takes more than to read its weights: see `check_resumable`."""

    format: Literal["streaming-rwkv-checkpoint/1"]
    step: int = Field(ge=0, le=_LARGEST_COUNT)
    tokens: int = Field(default=0, ge=0, le=_LARGEST_COUNT)
    samples: int = Field(default=0, ge=0, le=_LARGEST_COUNT)
    slots: int | None = Field(default=None, ge=0, le=_LARGEST_COUNT)
    """Missing in marks of an earlier version, where a batch never changed its size."""
    seconds: NonNegativeFloat = 0.0
    steps_skipped: NonNegativeInt = 0
    consumed: dict[str, NonNegativeFloat] = Field(default={})
    run: RunIdentity
    files: dict[str, MarkedFile] = Field(min_length=1)

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, MarkedFile]) -> dict[str, MarkedFile]:
        for name in files:
            # A reader joins this with a folder or a prefix: `../` or an absolute path would lead out of it.
            is_outside = name in ("", ".", "..") or any(character in name for character in "/\\\0")
            if is_outside or len(name.encode(errors="replace")) > 255:
                raise ValueError(f"names a file outside its folder, {name[:80]!r}; expected a plain file name")
        return files


def read_mark(path: Path) -> dict[str, Any]:
    """Return the completion mark of a checkpoint.

    Raises:
        CheckpointError: none there, no regular file, or not one of this format.
    """
    file = path / MARK_NAME
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_MARK_BYTES:
            raise CheckpointError(
                f"{file}: not a completion mark; expected a regular file of at most {LARGEST_MARK_BYTES:,} bytes"
            )
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path}: no completion mark ({MARK_NAME}); not a finished checkpoint of this program"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    return parse_mark(content, where=str(file))


def parse_mark(content: bytes, *, where: str) -> dict[str, Any]:
    """Check a completion mark and return its values.

    Raises:
        CheckpointError: not JSON, of another format, or with a field that is missing, unknown or wrong.
    """
    try:
        mark = json.loads(content)
        json.dumps(mark, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair is no text
        raise CheckpointError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(mark, dict) or mark.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not of the format {FORMAT!r}")
    try:
        return validate(CompletionMark, mark, where=where).model_dump(exclude_unset=True)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def check_resumable(mark: dict[str, Any], *, where: str) -> None:
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


def check_files(folder: Path, files: dict[str, Any]) -> None:
    """Compare the files of a checkpoint with its mark, by size first.

    Raises:
        ValueError: one is missing, no regular file, or not what was written.
    """
    for name, record in files.items():
        if (problem := find_file_problem(folder / name, record)) is not None:
            raise ValueError(problem)
        if sha256_of_file(folder / name) != record["sha256"]:
            raise ValueError(f"{name} is not what was written")


def find_file_problem(file: Path, record: dict[str, Any]) -> str | None:
    """Tell what is wrong with a file without reading it, or None."""
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return f"{file.name} is not a regular file"
    if status.st_size != record["bytes"]:
        return f"{file.name} has {status.st_size} bytes instead of {record['bytes']}"
    return None
