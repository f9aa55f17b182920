"""No process outlives its parent or its own work.

Nothing is imported here but the standard library: to die with a parent must be asked for before anything takes time.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    A launcher that gets SIGKILL cannot stop its ranks; they would go on training, and write checkpoints beside those
    of the run that replaced them.

    Args:
        parent: its number, where it is known: by now it may have ended, and another have taken its place. Without it,
            call this before anything that takes time.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_launcher(seconds: float = 60.0) -> None:
    """Wait for the launcher's SIGTERM in a rank that fails for the same reason as local rank 0 of its node.

    The launcher polls its ranks. As soon as one has failed, it sends SIGTERM to the others and then reports the status
    of the first that failed by rank. If this rank left earlier than local rank 0, that one would be killed before it
    could say what is wrong.

    Args:
        seconds: the longest wait, in case local rank 0 did not fail.
    """
    time.sleep(seconds)


def usable_cores() -> int:
    """Number of CPU cores that this process may use; all of the machine's where the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """Call `main`, and end this process with the status it gives, as `sys.exit(main())` would; but always end it.

    Threads of gloo still free the tensors of the last collective when a run is over, and need the interpreter for it.
    Whoever takes that apart, or the process group, waits for them for ever, or they abort the process (PyTorch #154976,
    #190489; up to one exit in five): a run that has succeeded would hang, or count as failed. So nothing is taken
    apart, after all that is registered for the end of a process has been called.
    """
    status = 1
    try:
        try:
            sys.exit(main())  # by this name: W&B learns the status there
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
        except BaseException as error:  # noqa: BLE001 - what the interpreter does with it
            status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
            sys.excepthook(type(error), error, error.__traceback__)
        # As multiprocessing ends the processes that it forks.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # nobody reads it any more, or ever did
                stream.flush()
    finally:  # a signal's exception too
        os._exit(status)
