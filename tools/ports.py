"""Ports for servers that tests start: none that the kernel hands out meanwhile, and none of another pytest worker's."""

from __future__ import annotations

import fcntl
import functools
import os
import random
import socket
import tempfile
from pathlib import Path

# One byte of it for each port. Its location is decided at import: tests change TMPDIR.
_LOCKS = Path(tempfile.gettempdir()) / f"test-ports-{os.getuid()}"
_ours: set[int] = set()  # a process's own locks do not keep it from locking again


def free_ports(count: int) -> list[int]:
    """Different ones that nobody has; they remain this process's until it ends, also while nothing listens there."""
    found: list[int] = []
    candidates = _candidates()
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        if len(found) == count:
            return found
        if port not in _ours and _lock(port) and _is_free(port):
            _ours.add(port)
            found.append(port)
    raise OSError(f"of the ports {candidates} not even {count} are free")


def _candidates() -> range:
    """Below those that connections and `bind` to port 0 get."""
    try:
        lower = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:  # not Linux
        lower = 0
    return range(lower - 12_000, lower) if lower > 14_000 else range(20_000, 32_000)


def _lock(port: int) -> bool:
    try:
        fcntl.lockf(_descriptor(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except (BlockingIOError, PermissionError):  # what a lock of another process raises, depending on the system
        return False
    return True


@functools.cache
def _descriptor() -> int:
    return os.open(_LOCKS, os.O_RDWR | os.O_CREAT, 0o600)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
