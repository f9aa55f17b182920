"""Loader processes: how they start and end, and the errors of those that could not start or were killed."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import re
import signal
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from streaming_rwkv.data.setting_names import RUN_SETTINGS, SettingNames
from streaming_rwkv.limits import limit_of
from streaming_rwkv.processes import STOP_SIGNALS, die_with_parent
from streaming_rwkv.shards import DataError

_WORKERS: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
os.register_at_fork(after_in_child=_WORKERS.clear)  # they are the parent's


def remember_workers(workers: Iterable[BaseProcess]) -> None:
    """Have these processes killed when this one ends."""
    _WORKERS.update(workers)


def kill_workers(workers: Iterable[BaseProcess]) -> None:
    """Kill the workers that did not end when they were told to: they ignore SIGTERM, and hold no state."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


@atexit.register  # after multiprocessing did, so this comes before its own: that one sends SIGTERM, and waits
def _kill_remembered() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error in the middle of this
    kill_workers(_WORKERS)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Hold back stop signals until the block ends; processes forked in the block hold them back until they unblock."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Prepare a loader process: it ends with its rank, and the signals that stop a run do not reach it."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    die_with_parent(rank.pid)
    # Launchers and terminals signal a rank's whole process group, systemd and schedulers all processes of a job. The
    # rank then finishes its step and writes a checkpoint, for which it needs its workers; they end with it.
    os.setpgid(0, 0)
    for number in STOP_SIGNALS:  # blocked since the fork: a signal that has arrived is dropped
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def explain_resource(error: BaseException, *, names: SettingNames = RUN_SETTINGS) -> str | None:
    """Describe the resource that a new process or thread lacked, its limit and the remedy; None for another error."""
    fewer = f"set `{names.workers}` lower"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"/dev/shm has no room for the semaphores of its queues; make it larger, or {fewer}"
    return limit_of(error, otherwise=fewer)


_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\.|exited)")


def explain_dead_worker(error: RuntimeError, *, names: SettingNames = RUN_SETTINGS) -> DataError | None:
    """Return the error for a loader process that was killed from outside, by torch's message; None for another error.

    torch raises it wherever the training process is at that moment, not only in the loader.
    """
    found = _DEAD_WORKER.search(str(error))
    if found is None:
        return None
    how = f"by signal {found[2]}" if found[2] else "from outside"
    return DataError(
        f"{names.workers}: loader process {found[1]} was ended {how}; most often the machine or the container ran out "
        f"of memory (see dmesg): give the job more, or {names.to_save_memory}"
    )
