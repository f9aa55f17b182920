"""Where input files lie: local folders and S3, listed and opened the same way."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from streaming_rwkv.config import UserError
from streaming_rwkv.storage import StorageError, Store, is_remote, open_store

SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


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
    paths = [path if is_remote(path) else os.path.normpath(os.path.expanduser(path)) for path in paths]
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        below = {file: (size, changed_ns) for file, size, changed_ns in _walk(source, path)}
        if not below:
            raise UserError(f"sources.{source}: no file to read below {path}; files must end in {', '.join(SUFFIXES)}")
        found |= below
    root = _common_root(sorted(found), paths)
    files = [
        InputFile(source=source, name=path[len(root) :], path=path, size=size, changed_ns=changed_ns)
        for path, (size, changed_ns) in found.items()
    ]
    return sorted(files, key=lambda file: file.name)


def _common_root(files: list[str], paths: list[str]) -> str:
    """What all names are relative to: the folder that was given, or the nearest one above all that were."""
    folders = [path.rstrip("/") for path in paths if path.rstrip("/") not in files and not glob.has_magic(path)]
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
    is_pattern = glob.has_magic(path) and not os.path.lexists(path)  # names may have brackets
    matches = sorted(glob.glob(path, recursive=True)) if is_pattern else [path]
    for match in matches:
        if os.path.isdir(match):
            for folder, folders, files in os.walk(match, followlinks=True):
                folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(folder, name)]
                yield from (_stat(f"{folder}/{name}") for name in files if _readable(name))
        elif os.path.isfile(match):
            if match == path:
                _check_suffix(source, path)
            elif not _readable(os.path.basename(match)):
                continue
            yield _stat(match)
        else:
            raise UserError(f"sources.{source}: {path}: no such file or folder")


def _check_suffix(source: str, path: str) -> None:
    if not path.endswith(SUFFIXES):
        raise UserError(f"sources.{source}: {path}: cannot be read; files must end in {', '.join(SUFFIXES)}")


def _readable(name: str) -> bool:
    """Whether a file that was not named, but lies in a folder or matches a pattern, is one to read."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "_"))


def _leads_back(folder: str, name: str) -> bool:
    """Whether this is a link to a folder above it: files below would be found again and again."""
    path = f"{folder}/{name}"
    return os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/")


def _stat(path: str) -> tuple[str, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend it, or take it out of the source") from None
    return path, status.st_size, status.st_mtime_ns


@lru_cache
def _bucket(name: str) -> Store:
    return open_store(f"s3://{name}")


def _walk_s3(source: str, url: str) -> Iterator[tuple[str, int, int]]:
    bucket, _, path = url.removeprefix("s3://").partition("/")
    path = path.rstrip("/")
    magic = glob.has_magic(path)
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


def open_file(path: str) -> IO[bytes]:
    """`path` for reading: a seekable binary file.

    Raises:
        UserError: it cannot be opened; of an object, reading raises it too.
    """
    if is_remote(path):
        bucket, _, name = path.removeprefix("s3://").partition("/")
        return _bucket(bucket).open(name)
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
