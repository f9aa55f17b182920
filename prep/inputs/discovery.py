"""Where input files lie: local folders and S3, listed and opened the same way."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from prep.inputs.files import COMPRESSIONS, SPECIAL, SUFFIXES, InputFile, bucket_store
from streaming_rwkv.config import UserError
from streaming_rwkv.location import checked_location, is_remote
from streaming_rwkv.storage import StorageError

logger = logging.getLogger(__name__)

_EXPECTED = (
    "files must end in .parquet, .jsonl, .ndjson, .jsonlines or .json, all but the first also with .gz, .zst, .bz2 "
    "or .xz"
)
_UNDERSCORE = "beginning with '_'"
_ENDINGS_SHOWN = 8
_LONGEST_ENDING = 12  # beyond that it is the end of a sentence


def find_files(source: str, paths: list[str]) -> list[InputFile]:
    """All readable files below `paths`, sorted by name. Files that are not read are counted in a line of the log.

    Raises:
        UserError: a path that is not there, or with nothing readable below it.
    """
    paths = [checked_location(path) for path in paths]
    paths = [path if is_remote(path) else os.path.normpath(os.path.expanduser(path)) for path in paths]
    found: dict[str, tuple[int, int]] = {}
    not_read: dict[str, str] = {}
    for path in paths:
        not_read_below: dict[str, str] = {}
        below = {file: (size, changed_ns) for file, size, changed_ns in _walk(source, path, not_read_below)}
        if not below:
            has = f" (it has {_counted(not_read_below)})" if not_read_below else ""
            raise UserError(f"sources.{source}: no file to read below {path}{has}; {_EXPECTED}")
        found |= below
        not_read |= not_read_below
    not_read = {path: why for path, why in not_read.items() if path not in found}
    if not_read:
        logger.info("sources.%s: not read: %s; %s", source, _counted(not_read), _EXPECTED)
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


def _counted(not_read: dict[str, str]) -> str:
    counts = sorted(Counter(not_read.values()).items(), key=lambda entry: (-entry[1], entry[0]))
    shown = [f"{count:,} {why}" for why, count in counts[:_ENDINGS_SHOWN]]
    if others := sum(count for _, count in counts[_ENDINGS_SHOWN:]):
        shown.append(f"{others:,} others")
    return ", ".join(shown)


def _walk(source: str, path: str, not_read: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    """(path, bytes, when it was changed) of each readable file; of others, `not_read` gets the reason."""
    if is_remote(path):
        yield from _walk_s3(source, path, not_read)
        return
    is_pattern = _is_pattern(path)
    matches = map(os.path.normpath, glob.glob(path, recursive=True)) if is_pattern else [path]
    for match in matches:
        is_folder = os.path.isdir(match)
        if is_pattern and (folder := _hidden_folder(match if is_folder else os.path.dirname(match), path)):
            _note_hidden(folder, not_read)
        elif is_folder:
            yield from _walk_folder(match, not_read)
        elif is_pattern:
            if _is_wanted(match, not_read) and (found := _stat(match, not_read)):
                yield found
        elif os.path.exists(match):
            if not os.path.isfile(match):
                raise UserError(f"sources.{source}: {path}: is a {SPECIAL}; expected a file, a folder or a pattern")
            _check_suffix(source, path)
            if found := _stat(match, not_read):
                yield found
        else:
            raise UserError(f"sources.{source}: {path}: no such file or folder")


def _walk_folder(top: str, not_read: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    for folder, folders, files in os.walk(top, followlinks=True, onerror=_raise_unreadable):
        for name in filter(_is_hidden, folders):
            _note_hidden(f"{folder}/{name}", not_read)
        folders[:] = [name for name in folders if not _is_hidden(name) and not _leads_back(f"{folder}/{name}", top)]
        for path in (f"{folder}/{name}" for name in files):
            if _is_wanted(path, not_read) and (found := _stat(path, not_read)):
                yield found


def _is_hidden(folder: str) -> bool:
    """Return True for a folder that holds no data by its name: `.git`, Spark's `_temporary`, but not `_year=2024`."""
    return folder.startswith(".") or (folder.startswith("_") and "=" not in folder)


def _hidden_folder(folder: str, pattern: str) -> str | None:
    """Return the first hidden folder on the way to `folder`; as in a shell, `*` matches none, but `_*` does."""
    names = folder.split("/")
    for depth, name in enumerate(names, start=1):
        wanted = (part for part in pattern.split("/") if part[:1] == name[:1])
        if _is_hidden(name) and not any(part == name or fnmatch.fnmatchcase(name, part) for part in wanted):
            return "/".join(names[:depth])
    return None


def _note_hidden(path: str, not_read: dict[str, str]) -> None:
    if os.path.basename(path).startswith("_"):  # names with a dot are hidden by design
        not_read[path] = _UNDERSCORE


def _is_pattern(path: str) -> bool:
    """A glob; names of local files and folders may have brackets too."""
    return glob.has_magic(path) and (is_remote(path) or not os.path.lexists(path))


def _check_suffix(source: str, path: str) -> None:
    if not path.lower().endswith(SUFFIXES):
        raise UserError(f"sources.{source}: {path}: cannot be read; {_EXPECTED}")


def _is_wanted(path: str, not_read: dict[str, str]) -> bool:
    """Return True for a file to read; it was not named, but is in a folder or matches a pattern."""
    name = os.path.basename(path)
    if name.startswith((".", "_")):
        _note_hidden(path, not_read)
        return False
    if not name.lower().endswith(SUFFIXES):
        not_read[path] = _ending(name.lower())
        return False
    return True


def _ending(name: str) -> str:
    stem, ending = os.path.splitext(name)
    if ending in COMPRESSIONS:
        ending = os.path.splitext(stem)[1] + ending
    if not ending:
        return "without an ending"
    return ending if ending.isprintable() and len(ending) <= _LONGEST_ENDING else "with another ending"


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


def _stat(path: str, not_read: dict[str, str]) -> tuple[str, int, int] | None:
    """Return (path, bytes, when it was changed), or None for a pipe, which would block, or a device without end."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        not_read[path] = SPECIAL
        return None
    return path, status.st_size, status.st_mtime_ns


def _walk_s3(source: str, url: str, not_read: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    bucket, _, path = url.removeprefix("s3://").partition("/")
    path = path.rstrip("/")
    magic = _is_pattern(url)
    # As `glob` has it for local files, and what lies below a folder that matches.
    pattern = re.compile((_glob_pattern(path) if magic else re.escape(path)) + ("(/.*)?" if path else ".*"))
    fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)] if magic else path
    try:
        for name, size, changed_ns in bucket_store(bucket).walk(fixed):
            found = f"s3://{bucket}/{name}"
            if name == path:
                _check_suffix(source, url)
            elif name.endswith("/") or not pattern.fullmatch(name):  # the first stands for a folder
                continue
            elif folder := _hidden_folder_s3(name, path, magic=magic):
                _note_hidden(f"s3://{bucket}/{folder}", not_read)
                continue
            elif not _is_wanted(found, not_read):
                continue
            yield found, size, changed_ns
    except StorageError as error:
        raise UserError(f"sources.{source}: {error}") from None


def _hidden_folder_s3(name: str, path: str, *, magic: bool) -> str | None:
    """Return the first hidden folder in an object's name, by the rules for local folders."""
    if magic:
        return _hidden_folder(name.rpartition("/")[0], path)
    below = name[len(path) :].lstrip("/").rpartition("/")[0]
    folder = _hidden_folder(below, "")
    return None if folder is None else f"{path}/{folder}".lstrip("/")


def _glob_pattern(path: str) -> str:
    """The regular expression of a glob: `*` and `?` stay within a folder, `**/` stands for any number of them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", path)
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    literal = (special.get(part) or (f"[^{part[2:]}" if part.startswith("[!") else part) for part in parts[1::2])
    return "".join(
        itertools.chain.from_iterable(itertools.zip_longest(map(re.escape, parts[::2]), literal, fillvalue=""))
    )
