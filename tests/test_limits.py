"""An error that comes from a limit of the system is one line with the limit's value."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streaming_rwkv.console import run_command
from streaming_rwkv.errors import UserError
from streaming_rwkv.filesystem import explained_writes
from streaming_rwkv.limits import check_open_files, explain_import, explain_limit, memory_limit

MEMORY = r"no memory is left, of [\d,]+ bytes \((the machine's memory|the container's memory|ulimit -v)\); give the job"
PROCESSES = (
    r"the limit of processes and threads is reached \((ulimit -u is \d+|no limit for the user); of a container: "
)
MAPPING = "libgomp-a34b3233.so.1: failed to map segment from shared object"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), f"^{MEMORY}"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), f"^Cannot allocate memory: {MEMORY}"),
        (ImportError(f"\nSee the page of common errors:\n  {MAPPING}\n"), f"^{re.escape(MAPPING)}: {MEMORY}"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.\nat line 3"),
            rf"you tried to allocate 64 bytes\.: {MEMORY}",
        ),
        (RuntimeError("std::bad_alloc"), f"^std::bad_alloc: {MEMORY}"),
        (RuntimeError("can't start new thread"), f"^can't start new thread: {PROCESSES}"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), f": {PROCESSES}"),
        (
            OSError(errno.EFBIG, "File too large", "a"),
            "^a: File too large: the limit of the file system is reached; raise",
        ),
        (OSError(errno.EMFILE, "Too many open files"), r"limit of \d+ open files \(ulimit -n\); raise that limit$"),
    ],
)
def test_the_limit_is_named_with_its_value(error: Exception, text: str) -> None:
    explained = explain_limit(error)
    assert explained is not None
    assert re.search(text, explained)
    assert "\n" not in explained


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory"),  # a GPU's
        ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),  # depends on the order of imports
        ImportError("No module named 'torch'"),
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
    ],
)
def test_another_error_is_not_explained(error: Exception) -> None:
    assert explain_limit(error) is None


@pytest.fixture
def limited_address_space() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    yield lambda size: resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_smallest_limit_of_memory_counts(limited_address_space: Callable[[int], None]) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    size, _ = memory_limit()
    limited_address_space(used + size)
    assert memory_limit() == (size, memory_limit()[1])
    limited_address_space(used + (1 << 30))
    assert memory_limit() == min((used + (1 << 30), "ulimit -v"), (size, memory_limit()[1]))


def test_a_command_without_memory_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: len(bytearray(1 << 60))) == 1
    assert re.match(f"error: {MEMORY}", error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_a_file_above_its_limit_names_the_limit(tmp_path: Path) -> None:
    limited = r"\(File too large\); the limit of a file is 1,000 bytes \(ulimit -f\); raise that limit$"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=limited), explained_writes(tmp_path / "a"):
            (tmp_path / "a").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_import_that_fails_in_little_memory_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (4 << 30, -1))
    assert explain_import(error) == (
        f"PyTorch cannot be imported ({error}), most likely for want of memory: ulimit -v is 4,294,967,296 bytes; "
        "raise that limit"
    )
    assert explain_import(ModuleNotFoundError("No module named 'torch'")) is None
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, -1))
    assert explain_import(error) is None


def test_few_open_files_are_refused() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    check_open_files(limit)
    with pytest.raises(OSError, match="Too many open files"):
        check_open_files(limit + 1)


class PanicException(BaseException):
    """As pyo3 names the panics of Rust libraries."""


def test_a_panic_at_a_limit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise PanicException('IOError(Os { code: 11, message: "Resource temporarily unavailable" })')

    assert run_command(run) == 1
    assert re.search(PROCESSES, capsys.readouterr().err)


def test_another_panic_is_not_explained() -> None:
    def run() -> int:
        raise PanicException("index out of bounds")

    with pytest.raises(PanicException):
        run_command(run)
