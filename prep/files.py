"""Where input files lie: local folders and S3, listed and opened the same way."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from streaming_rwkv.config import UserError

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
        UserError: a path that is not there, or nothing readable below them.
    """
    paths = [path if path.startswith("s3://") else os.path.normpath(os.path.expanduser(path)) for path in paths]
    found = {file: (size, changed_ns) for path in paths for file, size, changed_ns in _walk(source, path)}
    if not found:
        raise UserError(
            f"sources.{source}: no file to read below {', '.join(paths)}; files must end in {', '.join(SUFFIXES)}"
        )
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
    if path.startswith("s3://"):
        yield from _walk_s3(source, path)
        return
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    for match in matches:
        if os.path.isdir(match):
            for folder, folders, files in os.walk(match, followlinks=True):
                folders[:] = [name for name in folders if not name.startswith(".")]
                yield from (_stat(f"{folder}/{name}") for name in files if _readable(name))
        elif os.path.isfile(match):
            if not match.endswith(SUFFIXES):
                raise UserError(f"sources.{source}: {match}: cannot be read; files must end in {', '.join(SUFFIXES)}")
            yield _stat(match)
        else:
            raise UserError(f"sources.{source}: {path}: no such file or folder")


def _readable(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith((".", "_"))


def _stat(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _s3() -> Any:
    from pyarrow.fs import S3FileSystem

    endpoint = os.environ.get("S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
    return S3FileSystem(endpoint_override=endpoint) if endpoint else S3FileSystem()


def _walk_s3(source: str, url: str) -> Iterator[tuple[str, int, int]]:
    import fnmatch

    from pyarrow.fs import FileSelector, FileType

    path = url.removeprefix("s3://").rstrip("/")
    magic = glob.has_magic(path)
    fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)].rpartition("/")[0] if magic else path
    try:
        (info,) = _s3().get_file_info([fixed])
        if info.type == FileType.File:
            infos = [info]
        else:
            infos = _s3().get_file_info(FileSelector(fixed, recursive=True))
    except OSError as error:
        raise UserError(
            f"sources.{source}: {url}: {error}; check the bucket, the credentials, and S3_ENDPOINT_URL"
        ) from error
    for info in infos:
        wanted = info.type == FileType.File and _readable(info.base_name)
        if wanted and (not magic or fnmatch.fnmatchcase(info.path, path)):
            yield f"s3://{info.path}", info.size, info.mtime_ns or 0


def open_file(path: str) -> IO[bytes]:
    """`path` for reading: a seekable binary file."""
    if path.startswith("s3://"):
        file: IO[bytes] = _s3().open_input_file(path.removeprefix("s3://"))
        return file
    return Path(path).open("rb")
