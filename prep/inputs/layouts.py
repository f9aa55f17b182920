"""Layouts of parquet files, read in a process of their own, which pyarrow may end.

pyarrow does not catch the exceptions of its C++ library everywhere: a footer whose parts contradict each other ends the
process with `std::terminate`. A file that was damaged, or made to do so, must be named like any other broken file.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from prep.config import SourceConfig
from prep.inputs.faults import InputError
from prep.inputs.files import InputFile
from prep.inputs.parquet import read_parquet_layout
from streaming_rwkv.location import is_remote
from streaming_rwkv.processes import die_with_parent

_READ_AT_ONCE = 16  # from S3, where most of the time is waiting

Layout = list[tuple[int, int]]


def read_parquet_layouts(files: Sequence[InputFile], config: SourceConfig) -> Iterator[Layout]:
    """Yield (bytes of text, rows) of each row group, for each file in order.

    Raises:
        InputError: a file is not parquet, has no such column, or ends the process that reads it.
    """
    done = 0
    for layout in _forked(files, config):
        yield layout
        done += 1
    for file in files[done:]:  # the process died of one of those that it read at once
        layouts = list(_forked([file], config))
        if not layouts:
            raise InputError(f"{file.path}: cannot be read as parquet (pyarrow crashes); download it again")
        yield from layouts


def _forked(files: Sequence[InputFile], config: SourceConfig) -> Iterator[Layout]:
    """Yield the layouts of the first files: of all, or of those before the child process dies.

    Raises:
        InputError: as `read_parquet_layout`.
    """
    if not files:
        return
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_send_layouts, args=(theirs, files, config, os.getpid()), daemon=True)
    child.start()
    theirs.close()
    try:
        for _ in files:
            try:
                answer = ours.recv()
            except (EOFError, ConnectionError):
                return
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        ours.close()
        child.kill()
        child.join()


def _send_layouts(connection: Connection, files: Sequence[InputFile], config: SourceConfig, parent: int) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent decides
    # The parent names the file; what the C++ library and Python say before the process ends would hide that.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.disable()
    read = functools.partial(read_parquet_layout, config=config)
    at_once = _READ_AT_ONCE if any(is_remote(file.path) for file in files) else 1
    with contextlib.suppress(BrokenPipeError), ThreadPoolExecutor(at_once) as pool:
        try:
            for layout in pool.map(read, files):
                connection.send(layout)
        except Exception as error:  # noqa: BLE001  # raised again by the parent
            connection.send(error)
