"""Errors of the machine during a run: a full disk, a missing folder, a system limit, a killed loader process."""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from streaming_rwkv.config import UserError
from streaming_rwkv.data.workers import explain_dead_worker
from streaming_rwkv.filesystem import is_disk_full
from streaming_rwkv.limits import LIMIT_ERRORS, explain_limit, file_size_limit, limit_of

logger = logging.getLogger(__name__)

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_GONE = (errno.ENOENT, errno.ENOTDIR)
_OTHER_KIND = (errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOTEMPTY)
_LOST_RANK = re.compile(r"gloo/transport|Connection (?:closed|reset) by peer|remote process exited")
_RESUME = "the same command resumes from the newest checkpoint"


class MachineFault(UserError):
    """The machine stopped the run: a disk, a limit or memory."""


@contextmanager
def explained_faults(save_folder: Path) -> Iterator[None]:
    """Replace an error of the machine by one line with its remedy; other errors pass.

    Raises:
        UserError: the disk is full, the save folder is missing or cannot be written, a system limit is reached, or
            a loader process or another rank was killed.
        KeyboardInterrupt: it interrupted the writing of a checkpoint.
    """
    report_in_thread, threading.excepthook = threading.excepthook, _report_in_thread
    try:
        yield
    except UserError:
        raise
    except (*LIMIT_ERRORS, CheckpointException) as error:
        if any(isinstance(link, KeyboardInterrupt) for link in _chain(error)):  # Ctrl-C while a checkpoint was written
            raise KeyboardInterrupt from error
        explained = explain_fault(error, save_folder)
        if explained is None:
            raise
        raise explained from error
    finally:
        threading.excepthook = report_in_thread


def _report_in_thread(ended: threading.ExceptHookArgs) -> None:
    """Log an error of the file system, such as TensorBoard's; the main thread meets it too, and reports it once."""
    if isinstance(ended.exc_value, OSError):
        logger.debug("%s ended", ended.thread, exc_info=ended.exc_value)
    else:
        threading.__excepthook__(ended)


def explain_fault(error: BaseException, save_folder: Path) -> UserError | None:
    """Return the error of the machine that caused `error`, or None if there is none."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return link
        if isinstance(link, OSError) and (explained := _explain_os_error(link, save_folder)):
            return explained
        if isinstance(link, RuntimeError) and (dead := explain_dead_worker(link)):
            return dead
        if reason := explain_limit(link, otherwise="set `data.workers` (or, for memory, `microbatch_packs`) lower"):
            return MachineFault(f"{reason}; {_RESUME}")
    if any("unexpected pos" in str(link) for link in chain):  # torch's message for a write that was cut short
        or_limit = f", or raise the limit: {limit}" if (limit := file_size_limit()) else ""
        return MachineFault(
            f"{save_folder}: a checkpoint was not written whole; make space on its disk{or_limit}; {_RESUME}"
        )
    if any(isinstance(link, RuntimeError) and _LOST_RANK.search(str(link)) for link in chain):
        return MachineFault(
            "another rank of this run does not answer any more, most likely since it has ended; its own output tells "
            f"why; {_RESUME}"
        )
    return None


def _explain_os_error(error: OSError, save_folder: Path) -> MachineFault | None:
    place = error.filename if isinstance(error.filename, str) else str(save_folder)
    if is_disk_full(error):
        if limit := limit_of(error):
            return MachineFault(f"{place}: cannot be written ({error.strerror}); {limit}; {_RESUME}")
        return MachineFault(f"{place}: no space left on the disk ({error.strerror}); make space; {_RESUME}")
    if error.errno in _UNWRITABLE:
        return MachineFault(
            f"{place}: cannot be read or written any more ({error.strerror}); check the mount and its permissions; "
            f"{_RESUME}"
        )
    if error.errno in _GONE and Path(place).absolute().is_relative_to(save_folder.absolute()):
        return MachineFault(
            f"{place}: gone while the run was using it ({error.strerror}); check what removes files in {save_folder}; "
            "the same command resumes from the newest checkpoint that is left"
        )
    if error.errno in _OTHER_KIND and Path(place).absolute().is_relative_to(save_folder.absolute()):
        return MachineFault(
            f"{error.filename2 or place}: another kind of file than a run writes there ({error.strerror}); remove it, "
            "or give this run its own `save_folder`"
        )
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, the errors that ranks reported in it, and the causes of each."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, CheckpointException):
            waiting += [failure[0] for failure in link.failures.values()]
        waiting += [before for before in (link.__cause__, link.__context__) if before is not None]
