"""A remote file reads as a local one does, in few requests."""

from __future__ import annotations

import io
import itertools
import os
import random
import threading

import pytest

from streaming_rwkv.storage.remote_file import FIRST_BYTES, MOST_BYTES, RemoteFile

CONTENT = random.Random(1).randbytes(40 << 20)


class Requests:
    """The ranges that were requested, and the threads that did."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.made: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    def fetch(self, begin: int, end: int) -> bytes:
        assert 0 <= begin < end <= len(self.content)
        self.made.append((begin, end))
        self.threads.add(threading.get_ident())
        return self.content[begin:end]

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(RemoteFile(self.fetch, size=len(self.content)))


def test_a_file_read_to_its_end_takes_few_requests_that_do_not_overlap() -> None:
    requests = Requests()
    with requests.open() as file:
        assert b"".join(iter(lambda: file.read(1 << 17), b"")) == CONTENT
        assert file.read(10) == b""
    ends = [0, *(end for _, end in requests.made)]
    assert requests.made == list(itertools.pairwise(ends))
    sizes = [end - begin for begin, end in requests.made]
    assert sizes[:3] == [1 << 17, 1 << 18, 1 << 19]
    assert max(sizes) == MOST_BYTES
    assert len(sizes) == 7 + 4  # 128 KiB … 8 MiB, and the 24 MiB that are left
    assert len(requests.threads) == 2  # the next block comes while one is read


def test_a_read_at_the_end_of_a_file_fetches_no_more_than_there_is() -> None:
    requests = Requests()
    with requests.open() as file:
        assert file.seek(-8, os.SEEK_END) == len(CONTENT) - 8
        assert file.read(8) == CONTENT[-8:]
        file.seek(-1000, os.SEEK_END)
        assert file.read(992) == CONTENT[-1000:-8]
    assert len(requests.made) == 2
    assert all(end - begin <= FIRST_BYTES for begin, end in requests.made)


def test_a_small_file_takes_one_request_and_an_empty_one_none() -> None:
    requests = Requests(b"a line\n")
    with requests.open() as file:
        assert file.readlines() == [b"a line\n"]
    assert requests.made == [(0, 7)]
    with Requests(b"").open() as file:
        assert file.read() == b""


def test_jumps_read_what_a_local_file_reads() -> None:
    rng = random.Random(2)
    local = io.BytesIO(CONTENT)
    with Requests().open() as file:
        for _ in range(300):
            match rng.randrange(4):
                case 0:
                    position = rng.randrange(len(CONTENT) + 1000)
                    assert file.seek(position) == local.seek(position)
                case 1 if local.tell() > 1000:
                    assert file.seek(-rng.randrange(1000), os.SEEK_CUR) >= 0
                    local.seek(file.tell())
                case _:
                    size = int(2 ** rng.uniform(0, 22))
                    assert file.read(size) == local.read(size)
            assert file.tell() == local.tell()


def test_an_error_of_a_request_made_ahead_comes_when_its_bytes_are_read() -> None:
    def fetch(begin: int, end: int) -> bytes:
        if end > len(CONTENT) // 2:
            raise ConnectionError("gone")
        return CONTENT[begin:end]

    with io.BufferedReader(RemoteFile(fetch, size=len(CONTENT))) as file:
        assert file.read(len(CONTENT) // 4) == CONTENT[: len(CONTENT) // 4]
        with pytest.raises(ConnectionError, match="gone"):
            file.read()
