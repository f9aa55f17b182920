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
        UserError: a path that is not there, or with nothing readable below it.
    """
    paths = [path if path.startswith("s3://") else os.path.normpath(os.path.expanduser(path)) for path in paths]
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
    if path.startswith("s3://"):
        yield from _walk_s3(source, path)
        return
    matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    for match in matches:
        if os.path.isdir(match):
            for folder, folders, files in os.walk(match, followlinks=True):
                folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(folder, name)]
                yield from (_stat(f"{folder}/{name}") for name in files if _readable(name))
        elif os.path.isfile(match):
            if not match.endswith(SUFFIXES):
                raise UserError(f"sources.{source}: {match}: cannot be read; files must end in {', '.join(SUFFIXES)}")
            yield _stat(match)
        else:
            raise UserError(f"sources.{source}: {path}: no such file or folder")


def _readable(name: str) -> bool:
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


@lru_cache(maxsize=1)
def _s3() -> Any:
    from pyarrow.fs import S3FileSystem

    endpoint = os.environ.get("S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
    return S3FileSystem(endpoint_override=endpoint) if endpoint else S3FileSystem()


def _walk_s3(source: str, url: str) -> Iterator[tuple[str, int, int]]:
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
    # As `glob` has it for local files, and what lies below a folder that matches.
    pattern = re.compile(_glob_pattern(path) + "(/.*)?") if magic else re.compile(".*")
    for info in infos:
        if info.type == FileType.File and _readable(info.base_name) and pattern.fullmatch(info.path):
            yield f"s3://{info.path}", info.size, info.mtime_ns or 0


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
        UserError: it cannot be opened.
    """
    try:
        if path.startswith("s3://"):
            file: IO[bytes] = _s3().open_input_file(path.removeprefix("s3://"))
            return file
        return Path(path).open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror or error})") from None
