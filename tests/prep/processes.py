"""Builds in separate processes, for tests that kill them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

ROOT = Path(__file__).parents[2]
Found = TypeVar("Found")


@contextlib.contextmanager
def started(recipe: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a build in its own session; all its processes are killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prep", "build", str(recipe)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        kill(process)
        assert process.stderr is not None
        process.stderr.close()


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started, and wait until all have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not members(process.pid))


def members(group: int) -> list[int]:
    """Return the running processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def workers(group: int) -> list[int]:
    """Return the members of the group that were not started by its first process."""
    found = []
    for process in members(group):
        with contextlib.suppress(psutil.Error):
            if process != group and psutil.Process(process).ppid() != group:
                found.append(process)
    return found


def wait_for(condition: Callable[[], Found], *, seconds: float = 240) -> Found:
    """Wait until the condition is true, and return its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found
