"""Processes that end with their parent and with their own work.

Only the standard library and `console` are imported: `die_with_parent` must be called before any slow import.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

from streaming_rwkv.console import leave_closed_terminals

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends in any way.

    A launcher that gets SIGKILL cannot stop its ranks. They would continue to train, and write checkpoints beside those
    of the run that replaced them.

    Args:
        parent: the parent's process number, if known: it may have ended already, and another parent have adopted this
            process. Without it, call this before any slow work.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def start_resource_tracker() -> None:
    """Start the process by which Python removes shared memory, before anything else does, so that SIGHUP leaves it.

    It ignores SIGINT and SIGTERM alone. A terminal that is closed would end it before its parent, and its successor
    would answer each name that it does not know with a traceback.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, before)


def listen_to_stop_signals(ask_to_stop: Callable[[int], None]) -> dict[signal.Signals, Any]:
    """Call `ask_to_stop` with the number of each signal that asks a run to stop; return the handlers before.

    That of a terminal that is closed, SIGHUP, is one, unless `nohup` has it ignored.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        leave_closed_terminals()
        ask_to_stop(number)

    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heeded = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored]
    return {number: signal.signal(number, on_signal) for number in heeded}


def wait_for_launcher(seconds: float = 60.0) -> None:
    """Wait for the launcher's SIGTERM in a rank that fails for the same reason as local rank 0 of its node.

    The launcher polls its ranks. As soon as one has failed, it sends SIGTERM to the others and then reports the status
    of the failed one with the lowest rank. If this rank exited before local rank 0, the launcher would kill local rank
    0 before it could report the error.

    Args:
        seconds: the longest wait, in case local rank 0 did not fail; then this rank reports the error.
    """
    time.sleep(seconds)


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, or all of the machine where the system cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause garbage collection while large packages are imported.

    PyTorch, Composer and Streaming make a million objects, hardly one of them garbage. Collections that go through all
    of them again and again are a fifth of the time of importing them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end this process with the returned status, as `sys.exit(main())` would, but without fail.

    When a run is over, gloo's threads still free the tensors of the last collective, for which they need the
    interpreter. Finalizing the interpreter or the process group waits for them indefinitely, or they abort the process
    (PyTorch #154976, #190489; up to one exit in five): a successful run would hang, or count as failed. The process
    therefore ends without finalization, after all registered exit functions were called.
    """
    status = 1
    try:
        try:
            sys.exit(main())  # through this name, where W&B reads the status
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
        except BaseException as error:  # noqa: BLE001 - what the interpreter does with it
            status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
            sys.excepthook(type(error), error, error.__traceback__)
        # The same steps as at the end of a process forked by multiprocessing.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, or never open
                stream.flush()
    finally:  # a signal's exception too
        os._exit(status)
