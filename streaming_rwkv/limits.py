"""Limits of memory, processes, threads and open files: their values, and the errors of a program that reaches them.

Only the standard library and `errors` are imported, so that an import that fails for want of memory can be explained.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

from streaming_rwkv.errors import is_panic

LIMIT_ERRORS = (OSError, MemoryError, RuntimeError, ImportError)
"""The classes of errors that `explain_limit` may explain."""

_IMPORTS_NEED = 8 << 30  # bytes of address space, generously

# Texts of the dynamic linker, PyTorch, C++ and libuv; not those about static TLS or a GPU's memory.
_MEMORY = re.compile(
    r"can(?:'|no)t allocate memory(?! in static TLS)|failed to map segment|bad_alloc"
    r"|^(?!.*(?:CUDA|HIP)).*out of memory",
    re.IGNORECASE | re.MULTILINE,
)
_PROCESSES = re.compile(r"can't start new thread|resource temporarily unavailable", re.IGNORECASE)


def explain_limit(error: BaseException, *, otherwise: str = "") -> str | None:
    """Return what failed, the limit that it reached with its value, and the remedy; None for another error.

    Args:
        otherwise: what to do if the limit cannot be raised, as in "set `workers` lower".
    """
    reason = limit_of(error, otherwise=otherwise)
    if reason is None:
        return None
    lines = [error.strerror] if isinstance(error, OSError) and error.strerror else str(error).splitlines()
    telling = [line for line in lines if _MEMORY.search(line) or _PROCESSES.search(line)]
    cause = next(iter(telling or lines), "").strip()
    if cause and isinstance(error, OSError) and error.filename is not None:
        cause = f"{error.filename}: {cause}"
    return f"{cause}: {reason}" if cause else reason


def limit_of(error: BaseException, *, otherwise: str = "") -> str | None:
    """Return the limit that `error` comes from, its value and the remedy; None for another error."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error) if isinstance(error, RuntimeError | ImportError) or is_panic(error) else ""
    or_otherwise = f", or {otherwise}" if otherwise else ""
    remedy = f"; raise that limit{or_otherwise}"
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"this process has reached its limit of {limit} open files (ulimit -n){remedy}"
    if number == errno.ENFILE:
        return f"the machine's limit of open files is reached (sysctl fs.file-max){remedy}"
    if number == errno.EFBIG:
        return f"{file_size_limit() or 'the limit of the file system is reached'}{remedy}"
    if number == errno.EAGAIN or _PROCESSES.search(text):
        return f"the limit of processes and threads is reached ({_process_limits()}){remedy}"
    if number == errno.ENOMEM or isinstance(error, MemoryError) or _MEMORY.search(text):
        size, name = memory_limit()
        return f"no memory is left, of {size:,} bytes ({name}); give the job more{or_otherwise}"
    return None


def memory_limit() -> tuple[int, str]:
    """Return the largest number of bytes that this process can have, and the limit's name."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [(machine, "the machine's memory")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append((address_space, "ulimit -v"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is none, or it is `max`
            limits.append((int(Path(file).read_text()), "the container's memory"))
    return min(limits)


def file_size_limit() -> str | None:
    """Return the limit of a file's size with its value, or None if there is none."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else f"the limit of a file is {limit:,} bytes (ulimit -f)"


def explain_import(error: BaseException) -> str | None:
    """Return the likely reason why PyTorch or what is built on it cannot be imported; None if no limit is low.

    Where memory ends in the middle of an import, the error is often a later one: an operator that is missing.
    """
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if isinstance(error, ModuleNotFoundError) or not 0 <= address_space < _IMPORTS_NEED:
        return None
    cause = (str(error) or type(error).__name__).strip().splitlines()[-1]
    return (
        f"PyTorch cannot be imported ({cause}), most likely for want of memory: ulimit -v is {address_space:,} bytes; "
        "raise that limit"
    )


def check_open_files(least: int) -> None:
    """Check that this process may open `least` files.

    Raises:
        OSError: it may not, as when it opens one too many.
    """
    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < least:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _process_limits() -> str:
    """Return the limits that a new process or thread may reach, with their values."""
    user, space = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_AS))
    shown = "no limit for the user" if user == resource.RLIM_INFINITY else f"ulimit -u is {user}"
    shown += f"; of a container: {_read_pids_max()}"
    # Each thread needs a stack.
    return shown if space == resource.RLIM_INFINITY else f"{shown}; or that of memory: ulimit -v is {space:,} bytes"


def _read_pids_max() -> str:
    """Return the container's limit of processes, if its control group shows one."""
    for file in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        with suppress(OSError):
            return f"pids.max is {Path(file).read_text().strip()}"
    return "pids.max is unknown"
