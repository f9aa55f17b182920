"""A remote file that is fetched in blocks as it is read, with the next block fetched ahead."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

FIRST_BYTES = 1 << 16
"""Size of the first request after a seek; enough for the end of a parquet file."""
MOST_BYTES = 1 << 23
"""Largest size of a request in sequential reading, with the next block being fetched while one is read."""


class RemoteFile(io.RawIOBase):
    """`size` bytes, read through `fetch(begin, end)`, which returns the bytes from `begin` to before `end`.

    At most two blocks are kept. Every request costs tens of milliseconds, even a small one. In sequential reading the
    requests therefore double in size, and from the second one on a thread makes them ahead.
    """

    def __init__(self, fetch: Callable[[int, int], bytes | bytearray], *, size: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._size = size
        self._at = 0
        self._begin = self._end = 0  # of the current block
        self._block: bytes | bytearray = b""
        # The end of the next block, and its future content.
        self._ahead: tuple[int, Future[bytes | bytearray]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="remote-file")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size or not len(buffer):
            return 0
        if not self._begin <= self._at < self._end:
            self._turn_to_next_block(least=len(buffer))
        piece = memoryview(self._block)[self._at - self._begin :][: len(buffer)]
        memoryview(buffer)[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._block = b""
        super().close()

    def _turn_to_next_block(self, *, least: int) -> None:
        is_sequential = self._at == self._end and self._end > 0
        size = min(2 * (self._end - self._begin), MOST_BYTES) if is_sequential else FIRST_BYTES
        if is_sequential and self._ahead is not None:
            end, block = self._ahead[0], self._ahead[1].result()
        else:
            end = min(self._at + max(size, least), self._size)
            block = self._fetch(self._at, end)
        self._begin, self._end, self._block, self._ahead = self._at, end, block, None
        if is_sequential and end < self._size:
            after = min(end + min(2 * (end - self._begin), MOST_BYTES), self._size)
            self._ahead = after, self._pool.submit(self._fetch, end, after)
