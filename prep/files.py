"""Where input files lie: local folders and S3, listed and opened the same way."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import xxhash

from streaming_rwkv.config import UserError
from streaming_rwkv.location import checked_location, is_remote
from streaming_rwkv.storage import StorageError, Store, open_store

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file of a source."""

    source: str
    name: str  # relative to the source's folder, with forward slashes: part of the documents' keys
    path: str
    size: int
    changed_ns: int  # when its content last changed, as its file system tells

    @property
    def suffix(self) -> str:
        return max((suffix for suffix in SUFFIXES if self.name.endswith(suffix)), key=len)


def find_files(source: str, paths: list[str]) -> list[InputFile]:
    """All readable files below `paths`, sorted by name.

    Raises:
        UserError: a path that is not there, or with nothing readable below it.
    """
    paths = [checked_location(path) for path in paths]
    paths = [path if is_remote(path) else os.path.normpath(os.path.expanduser(path)) for path in paths]
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        below = {file: (size, changed_ns) for file, size, changed_ns in _walk(source, path)}
        if not below:
            raise UserError(f"sources.{source}: no file to read below {path}; files must end in {', '.join(SUFFIXES)}")
        found |= below
    for path in found:
        _check_name(source, path)
    found = {path: found[path] for path in _once(sorted(found))}
    root = _common_root(found.keys(), paths)
    files = [
        InputFile(source=source, name=path[len(root) :], path=path, size=size, changed_ns=changed_ns)
        for path, (size, changed_ns) in found.items()
    ]
    return sorted(files, key=lambda file: file.name)


def _check_name(source: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"sources.{source}: {os.fsencode(path)!r}: a name that is not UTF-8 (from an archive made elsewhere?); "
            "names are part of the documents' keys: rename it"
        ) from None


def _once(paths: Iterable[str]) -> Iterator[str]:
    """Each file by one path, the first, even if links lead to it on others."""
    seen: set[str] = set()
    for path in paths:
        real = path if is_remote(path) else os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield path


def _common_root(files: Collection[str], paths: list[str]) -> str:
    """What all names are relative to: the folder that was given, or the nearest one above all that were."""
    folders = [path.rstrip("/") for path in paths if path.rstrip("/") not in files and not _is_pattern(path)]
    single = [file.rpartition("/")[0] for file in files if not any(file.startswith(f"{above}/") for above in folders)]
    # Not os.path.commonpath, which makes one slash of the two in s3://.
    parts = [folder.split("/") for folder in (*folders, *single)]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    root = "/".join(level[0] for level in shared)
    return f"{root}/" if root else ""


def _walk(source: str, path: str) -> Iterator[tuple[str, int, int]]:
    if is_remote(path):
        yield from _walk_s3(source, path)
        return
    matches = map(os.path.normpath, glob.glob(path, recursive=True)) if _is_pattern(path) else [path]
    for match in matches:
        if os.path.isdir(match):
            for folder, folders, files in os.walk(match, followlinks=True, onerror=_raise_unreadable):
                folders[:] = [
                    name for name in folders if not name.startswith(".") and not _leads_back(f"{folder}/{name}", match)
                ]
                yield from (_stat(f"{folder}/{name}") for name in files if _readable(name))
        elif os.path.isfile(match):
            if match == path:
                _check_suffix(source, path)
            elif not _readable(os.path.basename(match)):
                continue
            yield _stat(match)
        else:
            raise UserError(f"sources.{source}: {path}: no such file or folder")


def _is_pattern(path: str) -> bool:
    """A glob; names of local files and folders may have brackets too."""
    return glob.has_magic(path) and (is_remote(path) or not os.path.lexists(path))


def _check_suffix(source: str, path: str) -> None:
    if not path.endswith(SUFFIXES):
        raise UserError(f"sources.{source}: {path}: cannot be read; files must end in {', '.join(SUFFIXES)}")


def _readable(name: str) -> bool:
    """Whether a file that was not named, but lies in a folder or matches a pattern, is one to read."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "_"))


def _leads_back(path: str, top: str) -> bool:
    """Whether this is a link to a folder on the way to it from `top`: files below would be found again and again."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    while len(path) > len(top):
        path = os.path.dirname(path)
        if f"{os.path.realpath(path)}/".startswith(f"{target}/"):
            return True
    return False


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable(error.filename, error)


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); mend it, or take it out of the source")


def _stat(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return path, status.st_size, status.st_mtime_ns


@lru_cache
def _bucket(name: str) -> Store:
    return open_store(f"s3://{name}")


def _walk_s3(source: str, url: str) -> Iterator[tuple[str, int, int]]:
    bucket, _, path = url.removeprefix("s3://").partition("/")
    path = path.rstrip("/")
    magic = _is_pattern(url)
    # As `glob` has it for local files, and what lies below a folder that matches.
    pattern = re.compile((_glob_pattern(path) if magic else re.escape(path)) + ("(/.*)?" if path else ".*"))
    fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)] if magic else path
    try:
        for name, size, changed_ns in _bucket(bucket).walk(fixed):
            hidden = "/." in (fixed[-1:] or "/") + name[len(fixed) :]
            if name == path:
                _check_suffix(source, url)
            elif hidden or not pattern.fullmatch(name) or not _readable(name.rpartition("/")[2]):
                continue
            yield f"s3://{bucket}/{name}", size, changed_ns
    except StorageError as error:
        raise UserError(f"sources.{source}: {error}") from None


def _glob_pattern(path: str) -> str:
    """The regular expression of a glob: `*` and `?` stay within a folder, `**/` stands for any number of them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", path)
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    literal = (special.get(part) or (f"[^{part[2:]}" if part.startswith("[!") else part) for part in parts[1::2])
    return "".join(
        itertools.chain.from_iterable(itertools.zip_longest(map(re.escape, parts[::2]), literal, fillvalue=""))
    )


def content_digest(file: InputFile) -> str:
    """What tells two contents of one size apart: a hash of a local file's bytes, an object's ETag.

    Raises:
        UserError: it cannot be read, or is another than when it was listed.
    """
    if is_remote(file.path):
        bucket, _, name = file.path.removeprefix("s3://").partition("/")
        found = _bucket(bucket).find(name)
        if found is None:
            raise UserError(f"{file.path}: is gone since it was listed; run the command again")
        return f"etag {found.etag}"
    digest = xxhash.xxh3_128()
    with opened(file) as stream:
        while block := stream.read(_HASHED_BYTES):
            digest.update(block)
    return f"xxh3 {digest.hexdigest()}"


@contextlib.contextmanager
def opened(file: InputFile) -> Iterator[IO[bytes]]:
    """`file` for reading, seekable.

    Raises:
        UserError: it cannot be opened, or is another than when it was listed, now or at the end; of an object, reading
            raises it too.
    """
    if is_remote(file.path):
        bucket, _, name = file.path.removeprefix("s3://").partition("/")
        with _bucket(bucket).open(name, listed=(file.size, file.changed_ns)) as stream:
            yield stream
        return
    try:
        raw = Path(file.path).open("rb", buffering=0)  # noqa: SIM115  # an error of opening only is meant
    except OSError as error:
        raise UserError(f"{file.path}: cannot be opened ({error.strerror})") from None
    with io.BufferedReader(_LocalFile(raw, file.path)) as stream:
        _check_unchanged(file, raw)
        yield stream
        _check_unchanged(file, raw)


class _LocalFile(io.RawIOBase):
    """Of which a read that fails is the disk's fault: to a decompressor it would look like a broken file."""

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
                "command again when it can be"
            ) from error

    def close(self) -> None:
        self._raw.close()
        super().close()


def _check_unchanged(file: InputFile, raw: io.FileIO) -> None:
    status = os.fstat(raw.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.size, file.changed_ns):
        raise UserError(
            f"{file.path}: has changed since it was listed: {file.size:,} bytes then, {status.st_size:,} now; wait "
            "until nothing writes it any more, then run the same command again"
        )
