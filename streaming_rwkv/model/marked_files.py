"""The files of a sharded checkpoint, with sizes and hashes from its completion mark `complete.json`.

A mark may come from anywhere, such as a copied folder or a bucket, and is validated. Reading weights needs only its
files; `train.checkpoints.record` describes its other fields.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ConfigDict, Field, field_validator

from streaming_rwkv.config import Config, ConfigError, UserError, validate
from streaming_rwkv.filesystem import is_plain_name, read_regular_file
from streaming_rwkv.location import is_remote
from streaming_rwkv.outputs import MARK_NAME
from streaming_rwkv.shards import sha256_of_file

FORMAT = "streaming-rwkv-checkpoint/2"
FORMATS = ("streaming-rwkv-checkpoint/1", FORMAT)
LARGEST_MARK_BYTES = 1 << 26
LARGEST_COUNT = 1 << 62
_COPY_AGAIN = "copy the checkpoint again from its source, or use another"


class CheckpointError(UserError):
    """A checkpoint that cannot be read, is no RWKV-7 model, or does not fit the model or run that loads it."""


def unreadable(path: str | Path, error: OSError) -> CheckpointError:
    """Return the error for a file or folder that the system does not let this user read; it need not be damaged."""
    return CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions")


def check_exists(location: str | Path) -> None:
    """Refuse a local checkpoint that does not exist; one in object storage is found out when it is read.

    Raises:
        CheckpointError: no such file or folder.
    """
    if not is_remote(location) and not Path(location).exists():
        raise CheckpointError(
            f"{location}: no such file or folder; give a run's save folder, one of its checkpoints, a .pth, or a "
            "Hugging Face folder"
        )


class MarkedFile(Config):
    """Size and hash of one file."""

    bytes: int = Field(ge=0, le=LARGEST_COUNT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class MarkedFiles(Config):
    """The part of a completion mark that readers of weights need; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    format: Literal["streaming-rwkv-checkpoint/1", "streaming-rwkv-checkpoint/2"]
    files: dict[str, MarkedFile] = Field(min_length=1)

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, MarkedFile]) -> dict[str, MarkedFile]:
        for name in files:
            if not is_plain_name(name):
                raise ValueError(f"names a file outside its folder, {name[:80]!r}; expected a plain file name")
        return files


MarkT = TypeVar("MarkT", bound=MarkedFiles)


def read_files(folder: Path) -> dict[str, MarkedFile]:
    """Return the files in a checkpoint's completion mark, by name.

    Raises:
        CheckpointError: no mark, not a regular file, or not one that can be relied on.
    """
    return parse_as(MarkedFiles, read_mark_bytes(folder), where=str(folder / MARK_NAME)).files


def read_mark_bytes(folder: Path) -> bytes:
    """Return the content of a checkpoint's completion mark.

    Raises:
        CheckpointError: no mark, not a regular file, too large, or unreadable.
    """
    file = folder / MARK_NAME
    try:
        return read_regular_file(file, most=LARGEST_MARK_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder}: no completion mark ({MARK_NAME}); not a finished checkpoint of this program"
        ) from None
    except UserError as error:
        raise CheckpointError(str(error)) from None


def parse_as(mark_type: type[MarkT], content: bytes, *, where: str) -> MarkT:
    """Return a completion mark from its content, with the fields of `mark_type`.

    Raises:
        CheckpointError: not JSON, of another format, or with a field that is missing, unknown or wrong.
    """
    try:
        mark = json.loads(content)
        json.dumps(mark, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # a lone surrogate cannot be encoded
        raise CheckpointError(f"{where}: not valid JSON ({error}); {_COPY_AGAIN}") from None
    if not isinstance(mark, dict) or mark.get("format") not in FORMATS:
        raise CheckpointError(f"{where}: not of the format {FORMAT!r}; {_COPY_AGAIN}")
    try:
        return validate(mark_type, mark, where=where)
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_COPY_AGAIN}") from None


def check_files(folder: Path, files: Mapping[str, MarkedFile]) -> None:
    """Compare the files of a checkpoint with its mark, by size first.

    Raises:
        ValueError: one is missing, is not a regular file, or differs from its record.
    """
    for name, record in files.items():
        if (problem := find_file_problem(folder / name, record)) is not None:
            raise ValueError(problem)
        if sha256_of_file(folder / name) != record.sha256:
            raise ValueError(f"{name} is not what was written")


def find_file_problem(file: Path, record: MarkedFile) -> str | None:
    """Return the problem of a file that can be found without reading it, or None."""
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return f"{file.name} is not a regular file"
    if status.st_size != record.bytes:
        return f"{file.name} has {status.st_size} bytes instead of {record.bytes}"
    return None
