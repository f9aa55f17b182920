"""No process outlives its parent, and no two runs write to one folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from pathlib import Path
from typing import IO

from streaming_rwkv.config import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    A launcher that gets SIGKILL cannot stop its ranks; they would go on training, and write checkpoints beside those
    of the run that replaced them.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def lock_folder(folder: Path, *, what: str, remedy: str) -> IO[str]:
    """Hold `folder` for this process; the lock goes with the process, however it ends.

    Returns:
        The open lock file: keep it.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - open for as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(f"{folder}: this {what} is in use (by process {holder}); stop that run, or {remedy}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
