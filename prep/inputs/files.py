"""Input files, the parts and units of work that they are divided into, and how they are opened, locally or on S3."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

import xxhash

from streaming_rwkv.config import UserError
from streaming_rwkv.location import is_remote
from streaming_rwkv.storage import Store, open_store

LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
INDEX_SUFFIX = ".idx"  # RWKV-LM's; the ids are in the file with IDS_SUFFIX beside it
IDS_SUFFIX = ".bin"
SUFFIXES = (
    ".parquet",
    INDEX_SUFFIX,
    *(form + compression for form in (*LINES_SUFFIXES, ".json") for compression in ("", *COMPRESSIONS)),
)
SPECIAL = "named pipe, socket or device"
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A local file or an object on S3 that belongs to a source."""

    source: str
    name: str  # relative to the source's folder, with forward slashes; part of the documents' keys
    path: str
    size: int
    changed_ns: int  # the modification time

    @property
    def suffix(self) -> str:
        """One of SUFFIXES, or IDS_SUFFIX, in lower case."""
        return max((suffix for suffix in (*SUFFIXES, IDS_SUFFIX) if self.name.lower().endswith(suffix)), key=len)

    @property
    def compression(self) -> str:
        """The suffix of the compression such as `.gz`, or an empty string."""
        return next((compression for compression in COMPRESSIONS if self.suffix.endswith(compression)), "")

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name[: -len(self.suffix)]

    @property
    def key_name(self) -> str:
        """The name from which documents' keys are made: for an `.idx` that of the JSON lines it was written from."""
        return f"{self.stem}.jsonl" if self.suffix == INDEX_SUFFIX else self.name


@dataclass(frozen=True, kw_only=True)
class Part:
    """A whole file, or a part of one that can be read separately."""

    file: InputFile
    first_row: int = 0
    row_groups: tuple[int, ...] | None = None  # of a parquet file
    byte_range: tuple[int, int] | None = None  # of whole lines in an uncompressed file
    ids: InputFile | None = None  # for an `.idx`, the `.bin` beside it
    rows: int | None = None  # for an `.idx`

    @property
    def is_cut(self) -> bool:
        """True if other parts hold other lines of the file."""
        return self.byte_range not in (None, (0, self.file.size))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit of work: the parts of files that one worker processes at a time."""

    name: str  # a digest of its rows, its files and the source's settings
    source: str
    parts: tuple[Part, ...]
    input_bytes: int  # weight in the progress display

    @property
    def where(self) -> str:
        """The place of its first row, for messages."""
        first = self.parts[0]
        return f"{first.file.path}, row {first.first_row}{' or a later file' if len(self.parts) > 1 else ''}"


@lru_cache
def bucket_store(name: str) -> Store:
    """Return the store of a bucket, the same one for each call."""
    return open_store(f"s3://{name}")


def content_digest(file: InputFile) -> str:
    """Return a value that differs between contents of one size: a hash of a local file's bytes, or an object's ETag.

    Raises:
        UserError: the file cannot be read, or has changed since it was listed.
    """
    if is_remote(file.path):
        bucket, _, name = file.path.removeprefix("s3://").partition("/")
        found = bucket_store(bucket).find(name)
        if found is None:
            raise UserError(f"{file.path}: has been removed since it was listed; run the command again")
        return f"etag {found.etag}"
    digest = xxhash.xxh3_128()
    with opened(file) as stream:
        while block := stream.read(_HASHED_BYTES):
            digest.update(block)
    return f"xxh3 {digest.hexdigest()}"


@contextlib.contextmanager
def opened(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file for reading; the stream is seekable.

    Raises:
        UserError: the file cannot be opened, or has changed since it was listed, on opening or at the end; for an
            object, also while reading.
    """
    if is_remote(file.path):
        bucket, _, name = file.path.removeprefix("s3://").partition("/")
        with bucket_store(bucket).open(name, listed=(file.size, file.changed_ns)) as stream:
            yield stream
        return
    try:
        raw = _open_unbuffered(file.path)
    except OSError as error:
        raise UserError(
            f"{file.path}: cannot be opened ({error.strerror}); restore the file, or leave it out of the "
            "source: finished work is kept"
        ) from None
    with io.BufferedReader(_LocalFile(raw, file.path)) as stream:
        _check_unchanged(file, raw)
        yield stream
        _check_unchanged(file, raw)


def _open_unbuffered(path: str) -> io.FileIO:
    """Open without blocking, even if a pipe has replaced the file."""
    return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


class _LocalFile(io.RawIOBase):
    """A local file whose read errors are reported as such; a decompressor would take them for a damaged file."""

    def __init__(self, raw: io.FileIO, path: str) -> None:
        super().__init__()
        self._raw, self._path = raw, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            return self._raw.readinto(buffer)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be read ({error.strerror or error}); finished work is kept, run the same "
                "command again once it can be read"
            ) from error

    def close(self) -> None:
        self._raw.close()
        super().close()


def _check_unchanged(file: InputFile, raw: io.FileIO) -> None:
    status = os.fstat(raw.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file.path}: was replaced by a {SPECIAL} after it was listed; expected a file")
    if (status.st_size, status.st_mtime_ns) != (file.size, file.changed_ns):
        raise UserError(
            f"{file.path}: has changed since it was listed: {file.size:,} bytes then, {status.st_size:,} now; wait "
            "until no program writes to it, then run the same command again"
        )
