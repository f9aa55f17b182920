"""The task store: finished work that survives a kill, verified by hash when it is used again.

    {out}/.prep/.lock            held by the one build that works here
    {out}/.prep/state.json       everything that decides the output, see `prep.execution.resume`
    {out}/.prep/done/{name}/     one folder for each finished task: its files and record.json
    {out}/.prep/tmp/             unfinished files; cleared at each start

A task writes to a temporary folder, which is renamed when it is complete. Files are not flushed to the disk: after a
loss of power a torn file has another hash, and its task is done again.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import xxhash

from streaming_rwkv.config import Config, UserError
from streaming_rwkv.filesystem import check_can_be_made, lock_folder, make_folder, replace_folder, temporary_folder
from streaming_rwkv.limits import LIMIT_ERRORS, explain_limit

DONE_FOLDER = "done"
TEMPORARY_FOLDER = "tmp"
_RECORD_NAME = "record.json"
_WHAT, _REMEDY = "folder of the data set", "choose another `out=`"


class WorkError(UserError):
    """The output folder is in use, belongs to another build, or cannot be written."""


class FileRecord(Config):
    """Size and hash of a file of a finished task."""

    bytes: int
    xxh3: str


class DoneRecord(Config):
    """The result of a finished task; subclasses add fields."""

    files: dict[str, FileRecord]


RecordT = TypeVar("RecordT", bound=DoneRecord)


def done_folder(work: Path, name: str) -> Path:
    """Return the folder of a finished task."""
    return work / DONE_FOLDER / name


def load_done(work: Path, name: str, record_type: type[RecordT]) -> RecordT | None:
    """Return the record of a finished task, or None if there is none or its files do not have the hashes in it."""
    folder = done_folder(work, name)
    try:
        record = record_type.model_validate_json((folder / _RECORD_NAME).read_bytes())
        whole = all(hash_file(folder / file) == expected for file, expected in record.files.items())
    except (OSError, ValueError):
        return None
    return record if whole else None


def temporary_task_folder(work: Path) -> AbstractContextManager[Path]:
    """Yield a folder of this task's own; it is removed unless `finish` renames it."""
    return temporary_folder(work / TEMPORARY_FOLDER)


def finish(temporary: Path, record: DoneRecord, *, work: Path, name: str) -> None:
    """Make the files in `temporary` the finished task `name`, in one step."""
    (temporary / _RECORD_NAME).write_text(record.model_dump_json())
    replace_folder(temporary, done_folder(work, name))  # one that exists has failed its verification


def hash_file(file: Path) -> FileRecord:
    """Return the size and hash of a file."""
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return FileRecord(bytes=size, xxh3=digest.hexdigest())


def check_can_be_locked(folder: Path) -> None:
    """Check that `locked` can make the work folder in a data set's folder; nothing is written.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    check_can_be_made(folder, what=_WHAT, remedy=_REMEDY)


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Lock the work folder: two builds in one folder would remove each other's work.

    Raises:
        UserError: another build holds it, or it cannot be made or written to.
    """
    make_folder(work.parent, what=_WHAT, remedy=_REMEDY)
    with lock_folder(work, what="work folder of a build", remedy=_REMEDY):
        shutil.rmtree(work / TEMPORARY_FOLDER, ignore_errors=True)
        yield


@contextlib.contextmanager
def explained_write_errors(out: Path) -> Iterator[None]:
    """Turn errors of the file system and of the system's limits into errors that say what to do.

    Raises:
        WorkError: no space left, quota exceeded, no permission, another error of the file system, or a limit of memory,
            processes or open files.
    """
    try:
        yield
    except LIMIT_ERRORS as error:
        if reason := explain_limit(error, otherwise="set `workers` lower"):
            raise WorkError(f"{reason}; finished work is kept, run the same command again") from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise WorkError(
                f"{error.filename or out}: cannot be written ({error.strerror}); choose another `out=`"
            ) from error
        if error.errno is None or isinstance(error, ConnectionError):  # not the file system's
            raise
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise WorkError(
                f"{error.filename or out}: cannot be read or written ({error.strerror}); finished work is kept, run "
                "the same command again when it can be"
            ) from error
        raise WorkError(
            f"{out}: no space left on the disk ({error.strerror}); make space (unfinished work needs about five bytes "
            "for each token, beside the shards), then run the same command again: finished work is kept"
        ) from error
