"""Folders that can be written, and by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from streaming_rwkv.config import UserError

logger = logging.getLogger(__name__)

# What file systems without locks answer: Lustre without `-o flock`, some NFS and FUSE mounts.
_WITHOUT_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class FolderLock:
    """A folder that this process holds until `release`, or until its own end, however that comes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = release


def make_folder(folder: Path, *, what: str, remedy: str) -> None:
    """Make `folder` if it is not there, and find out whether files can be written in it; none is seen.

    Args:
        what: what it is for, as in `save folder`.
        remedy: what names the setting, as in "give this run its own `save_folder`".
    Raises:
        UserError: it cannot be made or written to.
    """
    with _refusing(folder, what=what, remedy=remedy):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def _refusing(folder: Path, *, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: this {what} cannot be made, or not written to ({error.strerror}); mend that, or {remedy}"
        ) from None


def try_flock(descriptor: int) -> bool:
    """Lock an open file or folder for this process alone; False where its file system has no `flock`.

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


def warn_without_flock(folder: Path, *, what: str) -> None:
    """Say once that two processes in `folder` would not notice each other."""
    logger.warning(
        "%s: the file system has no locks (flock), so nothing stops a second run in this %s; start one at a time, or "
        "mount it with flock (Lustre: -o flock, NFS: without nolock)",
        *(folder, what),
    )


def has_flock(folder: Path) -> bool:
    """Tell from a temporary file whether files in `folder` can be locked."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return try_flock(file.fileno())


def lock_folder(folder: Path, *, what: str, remedy: str) -> FolderLock:
    """Hold `folder` for this process; keep the returned lock for as long as it shall be held.

    Raises:
        UserError: another process holds it, or it cannot be made or written to.
    """
    make_folder(folder, what=what, remedy=remedy)
    with _refusing(folder, what=what, remedy=remedy):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_flock(descriptor):
            warn_without_flock(folder, what=what)
    except BlockingIOError:
        holder = os.read(descriptor, 100).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise UserError(f"{folder}: this {what} is in use (by process {holder}); stop that run, or {remedy}") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return FolderLock(descriptor)
