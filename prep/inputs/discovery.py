"""Discovery of input files in local folders and on S3, by the same rules."""

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

from prep.inputs.files import COMPRESSIONS, IDS_SUFFIX, INDEX_SUFFIX, SPECIAL, SUFFIXES, InputFile, bucket_store
from streaming_rwkv.config import UserError
from streaming_rwkv.location import checked_location, expand_user, is_remote
from streaming_rwkv.storage import StorageError

logger = logging.getLogger(__name__)

_EXPECTED = (
    "files must end in .parquet, .jsonl, .ndjson, .jsonlines or .json, all but the first also with .gz, .zst, .bz2 "
    "or .xz"
)
_PLAIN_TEXT = "; write one JSON object a document, as docs/preparation.md shows for plain text"
_UNDERSCORE = "beginning with '_'"
_ENDINGS_SHOWN = 8
_LONGEST_ENDING = 12  # a longer one is not a file type


def find_files(source: str, paths: list[str]) -> list[InputFile]:
    """Return all readable files below `paths`, sorted by name; log the number of files that are not read, by reason.

    Raises:
        UserError: a path does not exist, or has no readable file below it.
    """
    paths = [checked_location(path) for path in paths]
    paths = [path if is_remote(path) else os.path.normpath(expand_user(path)) for path in paths]
    found: dict[str, tuple[int, int]] = {}
    not_read: dict[str, str] = {}
    for path in paths:
        not_read_below: dict[str, str] = {}
        below = {file: (size, changed_ns) for file, size, changed_ns in _walk(source, path, not_read_below)}
        if not below:
            has = f" (it has {_counted(not_read_below)})" if not_read_below else ""
            has_index = INDEX_SUFFIX in not_read_below.values()
            index = f"; {INDEX_SUFFIX} files are read where `paths` ends in {INDEX_SUFFIX}" if has_index else ""
            plain_text = _PLAIN_TEXT if ".txt" in not_read_below.values() else ""
            raise UserError(f"sources.{source}: no file to read below {path}{has}; {_EXPECTED}{index}{plain_text}")
        below |= _ids_beside(source, below)
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
    _check_keys(source, files)
    return sorted(files, key=lambda file: file.name)


def _ids_beside(source: str, indexes: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the `.bin` of each `.idx` among the paths, with its size and modification time."""
    found: dict[str, tuple[int, int]] = {}
    for index in indexes:
        if not index.lower().endswith(INDEX_SUFFIX):
            continue
        stem, ending = index[: -len(INDEX_SUFFIX)], index[-len(INDEX_SUFFIX) :]
        path = stem + (IDS_SUFFIX.upper() if ending.isupper() else IDS_SUFFIX)
        status: tuple[int, int] | None = None
        if is_remote(path):
            bucket, _, name = path.removeprefix("s3://").partition("/")
            try:
                if stored := bucket_store(bucket).find(name):
                    status = stored.size, stored.written_ns
            except StorageError as error:
                raise UserError(f"sources.{source}: {error}") from None
        elif os.path.isfile(path) and (local := _stat(path, {})):
            status = local[1:]
        if status is None:
            raise UserError(f"sources.{source}: {index}: found no {path} beside it, which holds its ids")
        found[path] = status
    return found


def _check_keys(source: str, files: list[InputFile]) -> None:
    """Check that no documents are read twice under the same keys."""
    names = {file.name for file in files if file.suffix != INDEX_SUFFIX}
    for file in files:
        if file.key_name != file.name and file.key_name in names:
            raise UserError(
                f"sources.{source}: both {file.name} and {file.key_name} are read, which hold the same documents; name "
                "one of them in `paths`"
            )


def _check_name(source: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"sources.{source}: {os.fsencode(path)!r}: its name is not UTF-8 (from an archive of another system?); "
            "names are part of the documents' keys: rename it"
        ) from None


def _once(paths: Iterable[str]) -> Iterator[str]:
    """Yield each file once, by the first of its paths, even if links give it others."""
    seen: set[str] = set()
    for path in paths:
        real = path if is_remote(path) else os.path.realpath(path)
        if real not in seen:
            seen.add(real)
            yield path


def _common_root(files: Collection[str], paths: list[str]) -> str:
    """Return the folder that names are relative to: the given folder, or the deepest one above all given paths."""
    folders = [path.rstrip("/") for path in paths if path.rstrip("/") not in files and not _is_pattern(path)]
    single = [file.rpartition("/")[0] for file in files if not any(file.startswith(f"{above}/") for above in folders)]
    # Not os.path.commonpath, which reduces s3:// to s3:/.
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
    """Yield (path, bytes, modification time) of each readable file; put the reason for others into `not_read`."""
    if is_remote(path):
        yield from _walk_s3(source, path, not_read)
        return
    is_pattern = _is_pattern(path)
    names_index = path.lower().endswith(INDEX_SUFFIX)
    if is_pattern:
        _check_no_link_leads_back(source, path)
    matches = map(os.path.normpath, glob.glob(path, recursive=True)) if is_pattern else [path]
    for match in matches:
        is_folder = os.path.isdir(match)
        if is_pattern and (folder := _hidden_folder(match if is_folder else os.path.dirname(match), path)):
            _note_hidden(folder, not_read)
        elif is_folder:
            yield from _walk_folder(match, not_read)
        elif is_pattern:
            if _is_wanted(match, not_read, names_index=names_index) and (found := _stat(match, not_read)):
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
    """Return the first hidden folder in a path; as in a shell, `*` does not match hidden names, but `_*` does."""
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
    """Return True for a glob; an existing local path is none, even if it has brackets."""
    return glob.has_magic(path) and (is_remote(path) or not os.path.lexists(path))


def _check_suffix(source: str, path: str) -> None:
    if not path.lower().endswith(SUFFIXES):
        plain_text = _PLAIN_TEXT if path.lower().endswith(".txt") else ""
        raise UserError(f"sources.{source}: {path}: cannot be read; {_EXPECTED}{plain_text}")


def _is_wanted(path: str, not_read: dict[str, str], *, names_index: bool = False) -> bool:
    """Return True if a file that was found in a folder or by a pattern is to be read.

    Args:
        names_index: the pattern ends in `.idx`. Others leave such files out: often they hold the texts of JSON files
            beside them, and files of other formats have the same ending.
    """
    name = os.path.basename(path)
    if name.startswith((".", "_")):
        _note_hidden(path, not_read)
        return False
    is_index = name.lower().endswith(INDEX_SUFFIX)
    if not name.lower().endswith(SUFFIXES) or (is_index and not names_index):
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
    """Return True for a link to a folder between it and `top`, below which the same files would be found again."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    while len(path) > len(top):
        path = os.path.dirname(path)
        if f"{os.path.realpath(path)}/".startswith(f"{target}/"):
            return True
    return False


def _check_no_link_leads_back(source: str, pattern: str) -> None:
    """Refuse links to folders above them, which `**` would follow again and again.

    Raises:
        UserError: there is one.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        return
    above = "/".join(parts[: parts.index("**")]) or ("/" if pattern.startswith("/") else os.curdir)
    for top in glob.glob(above):
        for folder, folders, _ in os.walk(top, followlinks=True):
            for path in (f"{folder}/{name}" for name in folders):
                if _leads_back(path, top):
                    raise UserError(
                        f"sources.{source}: {pattern}: `**` never ends at {path}, a link to {os.path.realpath(path)}, "
                        "which is above it; remove the link, or give the folder itself, where such links are left out"
                    )


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable(error.filename, error)


def _unreadable(path: str, error: OSError) -> UserError:
    remedy = "fix its permissions" if isinstance(error, PermissionError) else "repair it"
    return UserError(f"{path}: cannot be read ({error.strerror}); {remedy}, or remove it from the source")


def _stat(path: str, not_read: dict[str, str]) -> tuple[str, int, int] | None:
    """Return (path, bytes, modification time), or None for a pipe or device, which could block or never end."""
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
    # As `glob` for local files, and everything below a folder that matches.
    try:
        pattern = re.compile((_glob_pattern(path) if magic else re.escape(path)) + ("(/.*)?" if path else ".*"))
    except re.error as error:
        raise UserError(
            f"sources.{source}: {url}: not a pattern ({error}); brackets hold a range such as [0-9]"
        ) from None
    fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)] if magic else path
    try:
        for name, size, changed_ns in bucket_store(bucket).walk(fixed):
            found = f"s3://{bucket}/{name}"
            if name == path:
                _check_suffix(source, url)
            elif name.endswith("/") or not pattern.fullmatch(
                name
            ):  # a key that ends in a slash is a folder's placeholder
                continue
            elif folder := _hidden_folder_s3(name, path, magic=magic):
                _note_hidden(f"s3://{bucket}/{folder}", not_read)
                continue
            elif not _is_wanted(found, not_read, names_index=url.lower().endswith(INDEX_SUFFIX)):
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
    """Return the regular expression of a glob: `*` and `?` match within a folder, `**/` any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", path)
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    literal = (special.get(part) or (f"[^{part[2:]}" if part.startswith("[!") else part) for part in parts[1::2])
    return "".join(
        itertools.chain.from_iterable(itertools.zip_longest(map(re.escape, parts[::2]), literal, fillvalue=""))
    )
