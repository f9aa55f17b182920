"""Files and folders that appear whole or not at all, and folders that belong to one process at a time.

Everything is written under a temporary name in the folder of the final one, and renamed when it is complete. A name
that ends with `TEMPORARY_SUFFIX` therefore belongs to an unfinished write, which its writer may remove or overwrite.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from streaming_rwkv.errors import UserError
from streaming_rwkv.limits import limit_of

logger = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".tmp"
LOCK_NAME = ".lock"
LONGEST_NAME_BYTES = 255  # on Linux's file systems
_LOCK_POLL_SECONDS = 0.01

# Errors of `flock` on file systems without locks: Lustre without `-o flock`, some NFS and FUSE mounts.
_WITHOUT_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


# Writing


def temporary_path(path: Path) -> Path:
    """Return the name under which `path` is written until it is complete.

    The name is always the same, so that the next write takes over what a killed process left. Only one process may
    write at a time.
    """
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def is_plain_name(name: str) -> bool:
    """Return True for a name that a folder can have for a file in it.

    Readers append names that they find in manifests, indexes and marks to their own folder or prefix: `../` or an
    absolute path would lead outside.
    """
    is_outside = name in ("", ".", "..") or any(character in name for character in "/\\\0")
    return not is_outside and len(name.encode(errors="replace")) <= LONGEST_NAME_BYTES


def is_temporary(path: Path) -> bool:
    """Return True for the name of an unfinished write."""
    return path.name.endswith(TEMPORARY_SUFFIX)


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file or folder, with the names in both folders and the file's content on the disk.

    Files in a renamed folder are not flushed: call `fsync` for each of them before.
    """
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` in one step; it survives a loss of power as a whole, with the old content or the new.

    Args:
        durable: False where a loss of power may leave an empty file.
    """
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = False, concurrent: bool = False) -> Iterator[Path]:
    """Yield the path of a new, empty file, which replaces `path` if the block does not fail.

    A link at either name is replaced, not followed: the folder may have been copied from elsewhere.

    Args:
        durable: have the file on the disk before it gets its name.
        concurrent: other processes may write the same `path` meanwhile; the last one's file stays.
    """
    temporary = temporary_path(path.with_name(f"{path.name}.{uuid.uuid4().hex}") if concurrent else path)
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        if durable:
            rename_durably(temporary, path)
        else:
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the block's own error is the one to report
            temporary.unlink()
        raise


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is made if needed; the folder is removed unless the block renames it."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".", suffix=TEMPORARY_SUFFIX))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder, which becomes `folder` if the block does not fail, and is removed otherwise.

    Args:
        folder: does not exist, or is empty.
        within: where to make the temporary folder, on the same file system; by default beside `folder`.

    Raises:
        UserError: files have appeared in `folder` meanwhile.
    """
    with temporary_folder(within or folder.parent) as temporary:
        whole = temporary / folder.name  # with the permissions of any new folder, unlike those of a temporary one
        whole.mkdir()
        yield whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            whole.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UserError(f"{folder}: another process has written to it meanwhile; write to another place") from None


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space: of the disk, of a quota, or below a limit of file sizes."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained_writes(place: Path) -> Iterator[None]:
    """Replace an error of the file system by one that names the file, or `place` if the system names none.

    Raises:
        UserError: the disk is full, or a file cannot be made or written.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        raise UserError(
            f"{error.filename or place}: cannot be written ({error.strerror}); "
            f"{_remedy(error, otherwise='write to another place')}"
        ) from error


def _remedy(error: OSError, *, otherwise: str) -> str:
    return limit_of(error) or f"{'make space' if is_disk_full(error) else 'fix that'}, or {otherwise}"


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename a temporary folder; one that exists under the final name is removed before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


@contextlib.contextmanager
def append_to(path: Path) -> Iterator[BinaryIO]:
    """Open a file, which is made if needed, to add bytes at its end.

    Raises:
        UserError: a link, a pipe or another file that is not regular: the folder may have been copied from elsewhere.
        OSError: the file cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with os.fdopen(_open_regular(path, flags, remedy="a regular file to append to; remove it"), "ab") as file:
        yield file


def _open_regular(path: Path, flags: int, *, remedy: str) -> int:
    """Open a file without following a link, waiting for a pipe or reading a device.

    Raises:
        UserError: not a regular file; `remedy` says what is expected and what to do.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        kinds = {errno.ELOOP: stat.S_IFLNK, errno.ENXIO: stat.S_IFIFO, errno.EISDIR: stat.S_IFDIR}
        if error.errno not in kinds:  # ENXIO: a pipe that nobody reads, or a socket
            raise
        descriptor, mode = -1, kinds[error.errno]
    if stat.S_ISREG(mode):
        return descriptor
    if descriptor >= 0:
        os.close(descriptor)
    raise UserError(f"{path}: found {_kind(mode)}, expected {remedy}")


def check_replaceable(path: Path, is_ours: Callable[[Path], bool], *, remedy: str) -> None:
    """Refuse to replace a file whose content another program or the user wrote.

    A link, a pipe and an empty file have no content to lose.

    Args:
        is_ours: tells whether this program has written the file.
        remedy: where else to write, as in "name another with `--to FILE`".
    Raises:
        UserError: the file is not ours.
    """
    if path.is_file() and not path.is_symlink() and path.stat().st_size and not is_ours(path):
        raise UserError(f"{path}: exists, and was not written by this command; move it away, or {remedy}")


def check_no_links(paths: Iterable[Path], *, remedy: str) -> None:
    """Check that no file or folder among these, at any depth, is a link: work that is resumed may be a stranger's.

    Args:
        paths: what is written to and deleted; it need not exist.
        remedy: what to do, as in "choose another `out=`".
    Raises:
        UserError: one is a link, by which files elsewhere could be written and deleted.
    """
    for path in paths:
        below = (Path(above, name) for above, folders, files in os.walk(path) for name in (*folders, *files))
        for entry in itertools.chain([path], below):
            if entry.is_symlink():
                raise UserError(
                    f"{entry}: found a symbolic link, expected a file or folder that an earlier start of this program "
                    f"has written; {remedy}"
                )


# Reading


def open_regular_file(path: Path, *, most: int = sys.maxsize, follow: bool = True) -> BinaryIO:
    """Open a file of at most `most` bytes for reading, without waiting for a pipe or reading a device.

    Args:
        follow: follow links: Hugging Face's cache consists of them.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        UserError: not a regular file, too large, or unreadable.
    """
    limit = f" of at most {most:,} bytes" if most < sys.maxsize else ""
    expected = f"a regular file{limit}; restore it"
    try:
        if follow:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        else:
            descriptor = _open_regular(path, os.O_RDONLY, remedy=expected)
    except (FileNotFoundError, NotADirectoryError, UserError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); check its permissions") from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= most:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    found = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else _kind(status.st_mode)
    raise UserError(f"{path}: found {found}, expected {expected}")


def read_regular_file(path: Path, *, most: int, follow: bool = True) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        FileNotFoundError, NotADirectoryError, UserError: as `open_regular_file`.
    """
    with open_regular_file(path, most=most, follow=follow) as file:
        return file.read(min(most, os.fstat(file.fileno()).st_size))  # Python allocates as much as is asked for


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFLNK: "a symbolic link"}
    return kinds.get(stat.S_IFMT(mode), "a device or socket")


# Folders that can be written


def make_folder(folder: Path, *, what: str, remedy: str, mode: int = 0o777) -> None:
    """Make `folder` if it does not exist, and check that files can be written in it. No file becomes visible.

    Args:
        what: the folder's purpose, as in `save folder`.
        remedy: advice that names the setting, as in "give this run its own `save_folder`".
        mode: permissions of a new folder, before the umask.
    Raises:
        UserError: the folder cannot be made or written to.
    """
    with _explain_errors(folder, what=what, remedy=remedy):
        folder.mkdir(mode, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_can_be_made(folder: Path, *, what: str, remedy: str) -> None:
    """Check that `make_folder` can make the folder, or write in one that exists; nothing is left on the disk.

    Args:
        what, remedy: as for `make_folder`.
    Raises:
        UserError: the folder cannot be made or written to.
    """
    with _explain_errors(folder, what=what, remedy=remedy):
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        tempfile.TemporaryFile(dir=nearest).close()


@contextlib.contextmanager
def _explain_errors(folder: Path, *, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: this {what} cannot be made or written to ({error.strerror}); {_remedy(error, otherwise=remedy)}"
        ) from None


# Locks


class FolderLock:
    """A folder that this process holds until `release`, the end of a `with` block, or its own end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = release

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_folder(folder: Path, *, what: str, remedy: str) -> FolderLock:
    """Make `folder` if needed and hold it for this process, for as long as the returned lock is kept.

    On a file system without `flock` the folder is not protected; a warning says so.

    Args:
        what, remedy: as for `make_folder`.
    Raises:
        UserError: another process holds the folder, it cannot be made or written to, or its lock is no regular file.
    """
    make_folder(folder, what=what, remedy=remedy)
    return FolderLock(_hold(folder / LOCK_NAME, folder, what=what, remedy=remedy))


@contextlib.contextmanager
def sole_writer(output: Path, *, what: str, remedy: str, is_folder: bool = True) -> Iterator[None]:
    """Hold an output, a file or a folder, while the block writes it; nothing of the lock is left behind.

    The output's folder is made if needed.

    Args:
        what, remedy: as for `make_folder`.
    Raises:
        UserError: another process is writing there, or the folder cannot be made or written to.
    """
    folder = output if is_folder else output.parent
    make_folder(folder, what=what if is_folder else f"folder of the {what}", remedy=remedy)
    lock = folder / (LOCK_NAME if is_folder else f".{output.name}{LOCK_NAME}")
    while True:
        descriptor = _hold(lock, output, what=what, remedy=remedy)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
                break
        os.close(descriptor)  # its last holder has removed it after it was opened here
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # such as that of a folder that was removed
            lock.unlink()
        os.close(descriptor)


def _hold(lock: Path, place: Path, *, what: str, remedy: str) -> int:
    """Return the descriptor of a lock file, by which this process holds `place`."""
    descriptor = _open_lock(lock, place, what=what, remedy=remedy)
    try:
        _flock_or_warn(descriptor, place)
    except BlockingIOError:
        holder = os.read(descriptor, 100).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise UserError(f"{place}: this {what} is in use (by process {holder}); stop that run, or {remedy}") from None
    except BaseException:
        os.close(descriptor)
        raise
    with contextlib.suppress(OSError):  # a full disk holds no number; without it the holder is unknown, and holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _open_lock(lock: Path, place: Path, *, what: str, remedy: str) -> int:
    """Open a lock file, which is overwritten, so that no link may lead to another file."""
    with _explain_errors(place, what=what, remedy=remedy):
        return _open_regular(
            lock,
            os.O_RDWR | os.O_CREAT,
            remedy=f"the regular file of a lock; remove it, or {remedy}",
        )


@contextlib.contextmanager
def wait_for_lock(folder: Path, *, timeout_seconds: float) -> Iterator[None]:
    """Hold an existing folder during a short block, for work that only has to be kept apart; no file is made in it.

    Without `flock`, and when the lock is not free in time, the block runs all the same, after a warning.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        give_up = time.monotonic() + timeout_seconds
        while True:
            try:
                _flock_or_warn(descriptor, folder)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    logger.warning("%s: another process has held this folder for %d s", folder, timeout_seconds)
                    break
                time.sleep(_LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def has_flock(folder: Path) -> bool:
    """Find out with a temporary file whether files in `folder` can be locked."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _flock(file.fileno())


def _flock_or_warn(descriptor: int, folder: Path) -> None:
    if not _flock(descriptor):
        logger.warning(
            "%s: the file system has no locks (flock), so two processes that write here would not notice each other; "
            "start one at a time, or mount it with flock (Lustre: -o flock, NFS: without nolock)",
            folder,
        )


def _flock(descriptor: int) -> bool:
    """Lock an open file or folder for this process alone; return False where its file system has no `flock`.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno not in _WITHOUT_FLOCK:
            raise
        return False
    return True
